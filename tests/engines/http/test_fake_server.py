"""The fake server: the same answers every time, faults as told, and a command of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from blendserve.engines.http.fake_server import FAULTS, FakeSettings, answer, parse_faults, serving

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "n": 2, "max_tokens": 3}).encode()


def test_the_same_request_gets_the_same_answer() -> None:
    status, content = answer("/v1/chat/completions", BODY)
    assert status == 200
    assert answer("/v1/chat/completions", BODY) == (status, content)
    body = json.loads(content)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] <= 6
    assert answer("/v1/chat/completions", BODY + b" ")[1] != content
    assert answer("/v1/models", BODY)[0] == 404
    assert answer("/v1/completions", BODY)[0] == 400
    assert answer("/v1/completions", b"{")[0] == 400


def test_faults_follow_the_seed_and_end() -> None:
    def faults_of(seed: int) -> list[str | None]:
        with serving(FakeSettings(faults={"error": 0.3, "throttle": 0.3}, seed=seed, max_faults=2)) as server:
            for _ in range(8):
                request = urllib.request.Request(f"{server.base_url}/chat/completions", data=BODY)
                try:
                    urllib.request.urlopen(request).close()
                except urllib.error.HTTPError as error:
                    error.close()
        return [exchange.fault for exchange in server.exchanges]

    assert faults_of(1) == faults_of(1)
    assert len({tuple(faults_of(seed)) for seed in range(4)}) > 1
    assert sum(fault is not None for fault in faults_of(2)) <= 2


@pytest.mark.parametrize(("text", "message"), [("nonsense=0.1", "no fault 'nonsense'"), ("reset=0.6,hang=0.6", "1.2")])
def test_faults_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_faults(text)


def test_faults_are_read_from_one_argument() -> None:
    assert parse_faults("") == {}
    assert parse_faults("reset=0.1,hang=.2") == {"reset": 0.1, "hang": 0.2}
    assert parse_faults("error") == {"error": 1.0}
    assert len(set(FAULTS)) == len(FAULTS)


def test_the_command_listens_until_ctrl_c() -> None:
    command = [sys.executable, "-m", "blendserve.engines.http.fake_server", "--port", "0", "--faults", "reset=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        base_url = process.stdout.readline().removeprefix("listening on ").strip()
        with urllib.request.urlopen(urllib.request.Request(f"{base_url}/chat/completions", data=BODY)) as response:
            assert json.load(response)["choices"]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0

"""Every script in examples/ runs, on a tiny model or on the fakes that ship with the package."""

from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from batch_fakes import batch_line, read_rows, write_lines
from tiny_files import tiny_directory, write_directory
from tiny_models import random_weights, tiny_spec

from blendserve import ChatSettings, NativeSettings, run_batch
from blendserve.engines.http.fake_server import serving
from blendserve.engines.vllm import engine as vllm_engine
from blendserve.engines.vllm.fake import FakeVllm

EXAMPLES = Path(__file__).parent.parent / "examples"
NUM_LINES = 12


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [batch_line(f"r{number}") for number in range(NUM_LINES)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def answered(output: Path) -> list[str]:
    rows = read_rows(output)
    assert all(row["response"]["status_code"] == 200 for row in rows)
    return [row["custom_id"] for row in rows]


def test_native(
    source: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "run_native.py", source, tmp_path / "out.jsonl", tiny)
    assert answered(tmp_path / "out.jsonl") == [f"r{number}" for number in range(NUM_LINES)]
    printed = capsys.readouterr()
    assert f"{NUM_LINES} answers, 0 errors" in printed.out
    assert f"{NUM_LINES} of {NUM_LINES} requests" in printed.err


def test_vllm(
    source: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeVllm()
    monkeypatch.setattr(vllm_engine, "InstalledVllm", lambda: fake)
    monkeypatch.setattr(vllm_engine, "prepare_environment", lambda *_: None)
    run(monkeypatch, "run_vllm.py", source, tmp_path / "out.jsonl", tiny)
    assert len(answered(tmp_path / "out.jsonl")) == NUM_LINES
    assert "prefix hits" in capsys.readouterr().out
    (arguments,) = fake.opened
    assert arguments["gpu_memory_utilization"] == 0.9
    assert fake.engines[0].is_closed


def test_http(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as server:
        run(monkeypatch, "run_http.py", source, tmp_path / "out.jsonl", server.base_url)
    assert len(answered(tmp_path / "out.jsonl")) == NUM_LINES
    assert f"{NUM_LINES} requests sent to {server.base_url}" in capsys.readouterr().out


def test_map_table(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow", reason="tables need the extra data: pip install '.[data]'")
    run(monkeypatch, "map_table.py", EXAMPLES / "countries.jsonl", tmp_path / "out.jsonl", tiny)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in (EXAMPLES / "countries.jsonl").read_text().splitlines()]
    assert [{"id": row["id"], "country": row["country"]} for row in rows] == given
    assert "1 rows with errors" in capsys.readouterr().out or any("invalid_answer" in str(row["error"]) for row in rows)


@pytest.mark.slow
def test_replicas(
    source: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.50'")
    run(monkeypatch, "run_replicas.py", source, tmp_path / "out.jsonl", tiny)
    assert len(answered(tmp_path / "out.jsonl")) == NUM_LINES
    assert "2 replicas: planned load even" in capsys.readouterr().out


def test_no_example_is_left_out() -> None:
    scripts = {path.stem.removeprefix("run_") for path in EXAMPLES.glob("*.py")}
    assert scripts == {"native", "vllm", "http", "replicas", "map_table"}
    assert all(f"test_{name}" in globals() for name in scripts)


def test_the_lines_with_tools(tmp_path: Path) -> None:
    spec = replace(tiny_spec("llama"), max_position=4096)
    write_directory(tmp_path / "model", spec, random_weights(spec, 0))
    settings = NativeSettings(str(tmp_path / "model"), chat=ChatSettings(tool_format="hermes"))
    report = run_batch(EXAMPLES / "tools.jsonl", tmp_path / "out.jsonl", engine=settings)
    rows = {row["custom_id"]: row["response"]["body"]["choices"][0] for row in read_rows(tmp_path / "out.jsonl")}
    assert (report.num_succeeded, set(rows)) == (4, {"weather", "mail", "answer", "continued"})
    assert rows["mail"]["finish_reason"] == "tool_calls"
    (call,) = rows["mail"]["message"]["tool_calls"]
    assert set(json.loads(call["function"]["arguments"])) == {"folder", "urgent"}


def test_structured_answers(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with random weights says nothing true, but it keeps the shape."""
    source, target = EXAMPLES / "structured.jsonl", tmp_path / "out.jsonl"
    run(monkeypatch, "run_native.py", source, target, tiny)
    asked = {line["custom_id"]: line["body"] for line in read_rows(source)}
    answers = {row["custom_id"]: row["response"]["body"]["choices"][0] for row in read_rows(target)}
    assert answers.keys() == asked.keys()
    for name, choice in answers.items():
        assert choice["finish_reason"] in ("stop", "length")
        if name.startswith("mood"):
            assert choice["message"]["content"] in asked[name]["structured_outputs"]["choice"]
        if name.startswith("person") and choice["finish_reason"] == "stop":
            schema = asked[name]["response_format"]["json_schema"]["schema"]
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    assert re.fullmatch(asked["code-0"]["guided_regex"], answers["code-0"]["text"])

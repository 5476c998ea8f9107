"""A tiny model for the installed vLLM, and processes that run the command on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_files import write_directory
from tiny_models import random_weights, tiny_spec

from blendserve.engines.vllm.api import installed_version

pytestmark = [
    pytest.mark.peer,
    pytest.mark.slow,
    pytest.mark.skipif(
        installed_version() is None, reason="vLLM is not in this environment; scripts/test-vllm runs these where it is"
    ),
]


SPEC = tiny_spec("llama", hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=32, max_position=512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_directory(path, SPEC, random_weights(SPEC, 1))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "</s>"}))
    return path


TIMEOUT_S = 900.0


def environment() -> dict[str, str]:
    """As a user has it: without what other tests set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_"))}


def command(model: Path, source: Path, output: Path, *options: str) -> list[str]:
    """`blendserve run` on vLLM, with little of everything."""
    limits = ("--max-model-len", "512", "--max-num-seqs", "4", "--max-num-batched-tokens", "512", "--kv-memory", "4MiB")
    names = ("run", str(source), "-o", str(output), "--engine", "vllm", "--json", "--model", str(model))
    return [
        *(sys.executable, "-m", "blendserve", *names, *limits),
        *("--threads", "1", "--vllm-arg", "dtype=float32", *options),
    ]


def start(line: list[str], tmp_path: Path) -> subprocess.Popen[str]:
    with (tmp_path / "log").open("w") as log:
        return subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True)


def wait_for_answers(process: subprocess.Popen[str], tmp_path: Path, num_bytes: int) -> None:
    records = tmp_path / "out.jsonl.journal" / "records"
    deadline = time.monotonic() + TIMEOUT_S
    while not records.exists() or records.stat().st_size < num_bytes:
        assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(process: subprocess.Popen[str], exit_code: int = 0) -> dict[str, object]:
    """What a command printed at its end. Code 3: some lines have no answer."""
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == exit_code
    report: dict[str, object] = json.loads(out.splitlines()[-1])
    return report

"""Everything but the native engine works where the compiled core was not built. Each case is a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from batch_fakes import batch_line, read_rows, write_lines
from tiny_files import tiny_directory

from blendserve.engines.http.fake_server import serving

NUM_LINES = 5
WITHOUT_CORE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "blendserve._native":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
ON_FAKE_VLLM = """
from blendserve.engines.vllm import engine
from blendserve.engines.vllm.fake import FakeVllm
engine.InstalledVllm = FakeVllm
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_CORE + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def blendserve(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return python(before + "from blendserve.cli import main\nsys.exit(main())", *arguments)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [batch_line(f"r{number}") for number in range(NUM_LINES)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_directory(tmp_path_factory.mktemp("models") / "tiny"))


def test_the_core_is_really_hidden() -> None:
    done = python("from blendserve import _native")
    assert done.returncode == 1
    assert "cannot import name '_native'" in done.stderr


def test_the_package_imports() -> None:
    names = "NativeSettings, VllmSettings, HttpSettings, ReplicaSettings, SamplingParams, run_batch"
    done = python(f"from blendserve import {names}\nimport blendserve.engines.opening, blendserve.report.run_page")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("run", "--help-all"), ("models",)], ids=str)
def test_help_and_models_are_shown(arguments: tuple[str, ...]) -> None:
    done = blendserve(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_file_is_checked(source: Path, tiny: str) -> None:
    done = blendserve("check", str(source), "--model", tiny)
    assert (done.returncode, done.stdout.split(",")[0]) == (0, f"{NUM_LINES} lines"), done.stderr


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_a_file_is_planned_for_a_known_model(command: str, source: Path, tiny: str) -> None:
    target = ("--model", "llama-3-8b", "--tokenizer", tiny, "--hardware", "a100-80g")
    done = blendserve(command, str(source), *target, "--policy", "blend", "--json")
    assert done.returncode == 0, done.stderr


def test_a_server_answers(source: Path, tmp_path: Path) -> None:
    with serving() as server:
        files = (str(source), "-o", str(tmp_path / "out.jsonl"))
        done = blendserve("run", *files, "--engine", "http", "--base-url", server.base_url)
    assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "out.jsonl")) == NUM_LINES


def test_vllm_answers(source: Path, tmp_path: Path, tiny: str) -> None:
    files = (str(source), "-o", str(tmp_path / "out.jsonl"))
    done = blendserve("run", *files, "--engine", "vllm", "--model", tiny, before=ON_FAKE_VLLM)
    assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "out.jsonl")) == NUM_LINES


@pytest.mark.parametrize("command", ["run", "calibrate"])
def test_what_needs_the_core_says_what_to_do(command: str, source: Path, tmp_path: Path, tiny: str) -> None:
    files = (str(source), "-o", str(tmp_path / "out.jsonl"), "--model", tiny)
    done = blendserve(command, *(files if command == "run" else ("--quick",)))
    assert done.returncode == 1
    assert "this installation has no native engine" in done.stderr
    assert "--engine http" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_llm_says_what_to_do() -> None:
    done = python("import blendserve\nblendserve.LLM")
    assert "ConfigError: this installation has no native engine" in done.stderr

"""`blendserve run` on URLs: on a file system in memory, which stands for any other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from batch_fakes import batch_line
from tiny_files import tiny_directory

from blendserve import JobReport, NativeSettings, run_batch
from blendserve.cli import main
from blendserve.errors import ConfigError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def lines(count: int, *, num_bad: int = 0) -> bytes:
    rows = [
        json.dumps(batch_line(f"r{number}", {"prompt": f"the {number}", "max_tokens": 3})) for number in range(count)
    ]
    return "\n".join([*rows, *["{bad"] * num_bad]).encode()


def run(tiny: Path, source: str, output: str, *extra: str) -> int:
    limits = ["--kv-memory", "4MiB", "--max-num-seqs", "8", "--threads", "1", "--quiet"]
    return main(["run", source, "-o", output, "--model", str(tiny), *limits, *extra])


def test_a_url_is_answered_to_another(
    tiny: Path, tmp_path: Path, memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.pipe("/in/in.jsonl", lines(4, num_bad=1))
    where = ["memory://in/in.jsonl", "memory://out/out.jsonl", "--journal", str(tmp_path / "kept")]
    assert run(tiny, *where) == 3
    assert len(memory.cat("/out/out.jsonl").splitlines()) == 4
    assert len(memory.cat("/out/out.errors.jsonl").splitlines()) == 1
    told = capsys.readouterr().out
    assert "4 answers in memory://out/out.jsonl" in told
    assert "1 error in memory://out/out.errors.jsonl" in told or "1 errors in memory://out/out.errors.jsonl" in told
    memory.rm("/out/out.jsonl")
    assert run(tiny, *where) == 3
    assert "already complete: memory://out/out.jsonl" in capsys.readouterr().out
    assert len(memory.cat("/out/out.jsonl").splitlines()) == 4, "it is uploaded again"
    memory.pipe("/in/in.jsonl", lines(5))
    assert run(tiny, *where, "--fresh") == 0
    assert len(memory.cat("/out/out.jsonl").splitlines()) == 5
    assert not memory.exists("/out/out.errors.jsonl")


def test_files_and_urls_mix(tiny: Path, tmp_path: Path, memory: Any) -> None:
    memory.pipe("/in/in.jsonl", lines(2))
    kept = ["--journal", str(tmp_path / "kept")]
    assert run(tiny, "memory://in/in.jsonl", str(tmp_path / "out.jsonl"), *kept) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert run(tiny, str(tmp_path / "kept" / "input" / "in.jsonl"), "memory://out.jsonl", *kept) == 0
    assert len(memory.cat("/out.jsonl").splitlines()) == 2


def test_an_object_of_somebody_else_is_not_replaced(
    tiny: Path, tmp_path: Path, memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.pipe("/in/in.jsonl", lines(2))
    memory.pipe("/out.jsonl", b"mine")
    where = ["memory://in/in.jsonl", "memory://out.jsonl", "--journal", str(tmp_path / "kept")]
    assert run(tiny, *where) == 1
    assert "memory://out.jsonl exists (4 bytes) and is not of this job" in capsys.readouterr().err
    assert run(tiny, *where, "--fresh") == 0


def test_a_changed_input_is_fetched_again_and_told(
    tiny: Path, tmp_path: Path, memory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.pipe("/in/in.jsonl", lines(2))
    where = ["memory://in/in.jsonl", "memory://out.jsonl", "--journal", str(tmp_path / "kept")]
    assert run(tiny, *where) == 0
    memory.pipe("/in/in.jsonl", lines(3))
    assert run(tiny, *where) == 1
    assert "add --reuse to keep the answers of lines that did not change" in capsys.readouterr().err
    assert run(tiny, *where, "--reuse") == 0
    assert len(memory.cat("/out.jsonl").splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory://in.jsonl", "-o", "out.jsonl"], "name a directory for it with --journal DIR"),
        (["memory://in.jsonl", "--journal", "kept"], "say with -o where the answers go"),
        (["memory://in.jsonl", "-o", "out.jsonl", "--journal", "kept"], "there is no such file"),
        (["memory://in.jsonl", "other.jsonl", "-o", "out.jsonl", "--journal", "kept"], "run them one by one"),
        (["in.jsonl", "-o", "out.jsonl", "--journal", "kept"], "--journal is for URLs"),
        (["nowhere://in.jsonl", "-o", "out.jsonl", "--journal", "kept"], "cannot use nowhere://in.jsonl"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    memory: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not memory.store
    assert main(["run", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_python_takes_urls_too(tiny: Path, tmp_path: Path, memory: Any) -> None:
    memory.pipe("/in/in.jsonl", lines(4, num_bad=1))
    settings = NativeSettings(str(tiny), kv_memory_bytes=4 << 20, max_num_seqs=8, num_threads=1)

    def answer() -> JobReport:
        return run_batch("memory://in/in.jsonl", "memory://out/out.jsonl", engine=settings, journal=tmp_path / "kept")

    report = answer()
    assert (report.output_path, report.errors_path) == ("memory://out/out.jsonl", "memory://out/out.errors.jsonl")
    assert (report.num_succeeded, report.num_failed) == (4, 1)
    assert len(memory.cat("/out/out.jsonl").splitlines()) == 4
    assert answer().was_complete
    with pytest.raises(ConfigError, match="say with -o where the answers go"):
        run_batch("memory://in/in.jsonl", engine=settings, journal=tmp_path / "kept")
    with pytest.raises(ConfigError, match="name a directory for it with --journal DIR"):
        run_batch("memory://in/in.jsonl", tmp_path / "out.jsonl", engine=settings)

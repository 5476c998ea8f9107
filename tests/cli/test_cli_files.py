"""What the command makes of files: where answers go, which number it returns, and what other files and models do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_files import tiny_directory

from blendserve.cli import main

LIMITS = ["--kv-memory", "4MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--threads", "1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


def line(custom_id: str, **body: Any) -> str:
    messages = [
        {"role": "user", "content": "The capital of the country is in the text of the question of " + custom_id}
    ]
    content = {"messages": messages, "max_tokens": 6, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": content})


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(text + "\n" for text in lines))
    return path


def long_file(path: Path, num_lines: int) -> Path:
    """Lines of so many tokens that a run can be caught in its midst."""
    return write(path, *(line(f"r{number}", max_tokens=200, ignore_eos=True) for number in range(num_lines)))


def run(tiny: Path, *args: str | Path) -> int:
    return main(["run", *map(str, args), "--model", str(tiny), *LIMITS])


def answers(path: Path) -> dict[str, Any]:
    """Texts by custom_id."""
    rows = map(json.loads, path.read_text().splitlines())
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in rows}


def test_exit_codes_tell_how_a_job_ended(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "answered": (write(tmp_path / "a.jsonl", line("a")), 0),
        "some": (write(tmp_path / "b.jsonl", line("a"), "{broken"), 3),
        "none": (write(tmp_path / "c.jsonl", line("a", temperature="hot")), 3),
        "could not run": (write(tmp_path / "d.jsonl"), 1),
    }
    for source, code in files.values():
        for _ in range(2):  # the second time it is complete
            assert run(tiny, source, "--json") == code
            if code != 1:
                assert json.loads(capsys.readouterr().out)["exit_code"] == code
    capsys.readouterr()
    assert run(tiny, files["none"][0], "--fresh", "--quiet") == 3
    assert "no line was answered" in capsys.readouterr().out


def test_answers_go_beside_the_input_and_the_command_says_so(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", line("a"), line("b"))
    assert run(tiny, source) == 0
    assert f"answers go to {tmp_path}/in.out.jsonl\n" in capsys.readouterr().err
    assert sorted(answers(tmp_path / "in.out.jsonl")) == ["a", "b"]


def test_several_files_and_directories(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    lines = [line(f"r{number}", temperature=1.0) for number in range(8)]
    sources = [
        write(tmp_path / "in" / "a.jsonl", *lines[:5]),
        write(tmp_path / "in" / "b.jsonl", *lines[3:], "{broken"),
        write(tmp_path / "c.jsonl", *lines),
    ]
    assert run(tiny, tmp_path / "in", sources[2], "-o", tmp_path / "out", "--json") == 3
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_lines"], summary["num_succeeded"], summary["num_failed"]) == (19, 18, 1)
    assert [report["num_lines"] for report in summary["files"]] == [5, 6, 8]
    for source in sources:
        alone = tmp_path / f"alone-{source.name}"
        run(tiny, source, "-o", alone, "--quiet")
        assert answers(tmp_path / "out" / f"{source.stem}.out.jsonl") == answers(alone)
    capsys.readouterr()
    for more in (["-o", "-"], ["--errors", "e.jsonl"], ["-o", str(tmp_path / "one.jsonl")]):
        assert run(tiny, *sources, *more) == 1
        assert capsys.readouterr().err.count("\n") == 1


def command(tiny: Path, *args: str | Path) -> list[str]:
    return [sys.executable, "-m", "blendserve", "run", *map(str, args), "--model", str(tiny), *LIMITS]


@pytest.mark.slow
def test_answers_on_standard_output_go_on_after_a_kill(tiny: Path, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl", *(line(f"r{number}", max_tokens=150, ignore_eos=True) for number in range(60))
    )
    streamed = command(tiny, source, "-o", "-", "--json")
    process = subprocess.Popen(streamed, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(streamed, capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()
    assert rows[:3] == [row.decode().rstrip("\n") for row in first]
    assert sorted(json.loads(row)["custom_id"] for row in rows) == sorted(f"r{number}" for number in range(60))
    assert json.loads(done.stderr)["num_resumed"] >= 3
    assert done.stdout == (tmp_path / "in.out.jsonl").read_text()
    again = subprocess.run([*streamed, "--quiet"], capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_run_in_good_order(tiny: Path, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl", *(line(f"r{number}", max_tokens=150, ignore_eos=True) for number in range(40))
    )
    process = subprocess.Popen(command(tiny, source, "-o", "-"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 1
    assert "has closed it; finished answers are kept" in error
    assert "Traceback" not in error
    assert "Exception ignored" not in error


def test_a_file_for_another_model_is_one_error_and_no_obstacle(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from blendserve.engines.native import engine
    from blendserve.models.hub import ModelFiles, resolve

    def default_is_tiny(name: str | None, *args: Any, **kwargs: Any) -> ModelFiles:
        return ModelFiles("tiny", tiny) if name is None else resolve(name, *args, **kwargs)

    monkeypatch.setattr(engine, "resolve", default_is_tiny)
    source = write(tmp_path / "in.jsonl", *(line(f"r{number}", model="gpt-4o-mini") for number in range(5)))
    assert main(["run", str(source), *LIMITS]) == 1
    error = capsys.readouterr().err
    assert "asks for the model 'gpt-4o-mini' (5 lines, the first is line 1), and the model here is tiny" in error
    assert "--model tiny" in error
    assert not (tmp_path / "in.out.jsonl").exists()
    assert run(tiny, source) == 0
    assert "The file asks for gpt-4o-mini; it was answered by tiny." in capsys.readouterr().out


def test_export_writes_what_there_is(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", line("a"), line("b"), "{broken")
    assert run(tiny, source, "-o", tmp_path / "out.jsonl", "--quiet") == 3
    capsys.readouterr()
    copy = tmp_path / "copy.jsonl"
    for given in ("out.jsonl", "out.jsonl.journal"):
        assert main(["export", str(tmp_path / given), "-o", str(copy)]) == 0
        assert capsys.readouterr().out == f"3 lines, finished: 2 answers and 1 error row in {copy}\n"
        assert copy.read_bytes() == (tmp_path / "out.jsonl").read_bytes()
        assert (tmp_path / "copy.errors.jsonl").read_bytes() == (tmp_path / "out.errors.jsonl").read_bytes()
        assert main(["export", str(tmp_path / given), "-o", str(copy)]) == 1
        assert "exists; give -o another path" in capsys.readouterr().err
        copy.unlink()
        (tmp_path / "copy.errors.jsonl").unlink()
    assert main(["export", str(tmp_path / "out.jsonl"), "-o", str(tmp_path / "out.errors.jsonl")]) == 1
    assert "is a file of the job itself" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing.jsonl"), "-o", str(copy)]) == 1
    assert "there is no journal" in capsys.readouterr().err


@pytest.mark.slow
def test_export_while_a_job_runs(tiny: Path, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl", *(line(f"r{number}", max_tokens=200, ignore_eos=True) for number in range(400))
    )
    output = tmp_path / "out.jsonl"
    process = subprocess.Popen(command(tiny, source, "-o", output, "--quiet"), stdout=subprocess.DEVNULL)
    records = tmp_path / "out.jsonl.journal" / "records"
    while process.poll() is None and not (records.exists() and records.stat().st_size > 20_000):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGSTOP)
    copy = tmp_path / "so-far.jsonl"
    try:
        assert main(["export", str(output), "-o", str(copy)]) == 0
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert process.wait() == 0
    so_far, whole = copy.read_text().splitlines(), output.read_text().splitlines()
    assert 10 < len(so_far) < 400
    assert so_far == whole[: len(so_far)]

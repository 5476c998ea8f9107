"""The command line on tiny models: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tiny_files import tiny_directory
from tiny_models import tiny_spec

from blendserve.cli import main
from blendserve.config import BLOCK_SIZE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


def line(custom_id: str, **body: Any) -> str:
    content = {
        "model": "m",
        "messages": [{"role": "user", "content": f"what is {custom_id}?"}],
        "max_tokens": 6,
        **body,
    }
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": content})


def rows_by_id(path: Path) -> dict[str, Any]:
    return {row["custom_id"]: row for row in map(json.loads, path.read_text().splitlines())}


def run_args(tiny: Path, source: Path, output: Path, *extra: str) -> list[str]:
    limits = ["--kv-memory", "4MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--threads", "2"]
    return ["run", str(source), "-o", str(output), "--model", str(tiny), *limits, *extra]


def test_run_answers_every_line_and_sets_errors_apart(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([line("a"), "{nonsense", line("b", n=2), line("c", tools=[{"type": "function"}])]))
    assert main(run_args(tiny, source, output)) == 3
    assert sorted(rows_by_id(output)) == ["a", "b"]
    assert len(rows_by_id(output)["b"]["response"]["body"]["choices"]) == 2
    errors = [json.loads(text) for text in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert len(errors) == 2
    captured = capsys.readouterr()
    assert "2 answers" in captured.out
    assert "2 errors" in captured.out
    assert "scheduling" in captured.out
    assert "3/3 requests" in captured.err, "plain progress lines where there is no terminal"


def test_the_summary_as_json(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a") + "\n" + line("b"))
    assert main(run_args(tiny, source, output, "--json")) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["num_succeeded"] == 2
    assert summary["num_prompt_tokens"] > 0
    assert 0 <= summary["scheduling_share"] <= 1
    assert 0 < summary["balance"] <= 1
    assert captured.err == ""


def test_memory_and_start_up_are_told(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    assert main(run_args(tiny, source, output, "--quiet")) == 0
    assert re.search(r"memory \d+.* resident at the peak: weights \d+ kB, KV .* 4.19 MB", capsys.readouterr().out)
    assert main(run_args(tiny, source, output, "--fresh", "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (4 << 20) - (1 << 16) < summary["kv_bytes"] <= 4 << 20
    assert 0 < summary["weight_bytes"] < summary["peak_rss_bytes"]
    assert summary["startup_s"] > 0


def test_a_run_writes_its_report_and_trace(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    report, trace = tmp_path / "report.html", tmp_path / "trace.json"
    source.write_text(line("a") + "\n" + line("b"))
    files = ["--report", str(report), "--trace", str(trace)]
    assert main(run_args(tiny, source, output, "--quiet", *files)) == 0
    assert "Measured: policy blend" in report.read_text()
    ops = {event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("cat") == "memory"}
    assert ops == {"attention"}
    assert main(run_args(tiny, source, output, "--fresh", "--report", str(tmp_path / "nowhere" / "report.html"))) == 1
    assert "there is no directory" in capsys.readouterr().err
    assert main(run_args(tiny, source, output, "--engine", "http", "--base-url", "http://localhost:1", *files)) == 1
    assert "native engine" in capsys.readouterr().err
    for option in ("--report", "--trace"):
        assert main(run_args(tiny, source, output, "--fresh", option, str(source))) == 1
        assert f"{option} {source} is the input file" in capsys.readouterr().err
    assert source.read_text() == line("a") + "\n" + line("b")


def test_a_finished_run_is_not_repeated(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    assert main(run_args(tiny, source, output, "--quiet")) == 0
    before = output.read_bytes()
    assert main(run_args(tiny, source, output, "--quiet")) == 0
    assert "already complete" in capsys.readouterr().out
    assert output.read_bytes() == before


def test_ordered_output_is_in_the_order_of_the_input(tiny: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    names = [f"r{i}" for i in range(12)]
    source.write_text("\n".join(line(name, max_tokens=1 + i * 5 % 13) for i, name in enumerate(names)))
    assert main(run_args(tiny, source, output, "--ordered", "--policy", "random", "--quiet")) == 0
    assert list(rows_by_id(output)) == names


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "missing.jsonl", "-o", "out.jsonl"], "missing.jsonl"),
        (["run", ".", "-o", "out.jsonl"], "directory"),
        (["check", "missing.jsonl"], "missing.jsonl"),
        (["models", "pull", "no-such-model"], "no-such-model"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(
    args: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [] if args[0] == "models" else ["--model", str(tiny)]
    assert main([*args, *model]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("blendserve: ")
    assert error.count("\n") == 1


def test_check_counts_errors_with_line_numbers(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join([line("a"), "{nonsense", line("a"), line("b", temperature="hot")]))
    assert main(["check", str(source), "--model", str(tiny)]) == 1
    printed = capsys.readouterr().out
    assert "4 lines, 1 valid" in printed
    assert "invalid_json_line: 1 line (2)" in printed
    assert "duplicate_custom_id: 1 line (3)" in printed
    source.write_text(line("a"))
    assert main(["check", str(source), "--model", str(tiny), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_valid"] == 1


def test_a_context_beyond_the_models_is_refused_before_any_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    for command in (["check", str(source), "--model", str(tiny)], run_args(tiny, source, output)):
        assert main([*command, "--max-model-len", "1024"]) == 1
        assert "made for 512 tokens" in capsys.readouterr().err
        with pytest.raises(SystemExit) as end:
            main([*command, "--max-model-len", "-5"])
        assert end.value.code == 2
        assert "'-5' is not a whole number" in capsys.readouterr().err


def test_a_journal_of_other_kernels_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--isa auto` on another machine would go on with tokens that round differently."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    monkeypatch.setattr("blendserve.engines.native.engine.best_isa", lambda: "portable")
    assert main(run_args(tiny, source, output, "--quiet")) == 0
    assert main(run_args(tiny, source, output, "--quiet", "--isa", "portable")) == 0
    monkeypatch.setattr("blendserve.engines.native.engine.best_isa", lambda: "avx2")
    assert main(run_args(tiny, source, output, "--quiet")) == 1
    assert "(--isa) was portable, is avx2" in capsys.readouterr().err


def test_a_journal_of_another_precision_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    assert main(run_args(tiny, source, output, "--quiet", "--dtype", "int8")) == 0
    assert main(run_args(tiny, source, output, "--quiet", "--dtype", "int8")) == 0
    assert main(run_args(tiny, source, output, "--quiet")) == 1
    assert "dtype was int8, is bf16" in capsys.readouterr().err
    assert main(run_args(tiny, source, output, "--quiet", "--dtype", "int8", "--kv-dtype", "int8")) == 1
    assert "--kv-dtype was bf16, is int8" in capsys.readouterr().err


def without_history(rows: dict[str, Any]) -> dict[str, Any]:
    for row in rows.values():
        del row["response"]["body"]["created"], row["response"]["body"]["usage"]["prompt_tokens_details"]
    return rows


def test_a_run_in_windows_gives_the_same_rows(tiny: Path, tmp_path: Path) -> None:
    source, whole, windowed = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "windowed.jsonl"
    source.write_text("\n".join(line(f"r{i}", max_tokens=1 + i * 5 % 13, n=1 + i % 2) for i in range(40)))
    assert main(run_args(tiny, source, whole, "--quiet")) == 0
    expected = without_history(rows_by_id(whole))
    for policy in ("blend", "random"):
        assert main(run_args(tiny, source, windowed, "--window", "7", "--policy", policy, "--fresh")) == 0
        assert without_history(rows_by_id(windowed)) == expected


def test_more_kv_memory_answers_what_did_not_fit(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("short") + "\n" + line("long", max_tokens=150, ignore_eos=True))
    few_blocks = str(4 * BLOCK_SIZE * tiny_spec().kv_bytes_per_token())
    assert main(run_args(tiny, source, output, "--json", "--kv-memory", few_blocks)) == 3
    summary = json.loads(capsys.readouterr().out)
    assert summary["errors_by_code"] == {"insufficient_memory": 1}
    assert any("--kv-memory" in note for note in summary["notes"])
    assert main(run_args(tiny, source, output, "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_succeeded"], summary["num_resumed"], summary["errors_by_code"]) == (2, 1, {})
    assert sorted(rows_by_id(output)) == ["long", "short"]
    assert not (tmp_path / "out.errors.jsonl").exists()


def test_models_lists_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLENDSERVE_CACHE", str(tmp_path))
    assert main(["models"]) == 0
    assert "SmolLM2-135M-Instruct (default)" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "check", "models"])
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"blendserve {command}" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tiny: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lengths = [1 + i * 37 % 400 for i in range(120)]
    source.write_text("\n".join(line(f"r{i}", max_tokens=n, ignore_eos=True) for i, n in enumerate(lengths)))
    command = [sys.executable, "-m", "blendserve", *run_args(tiny, source, output, "--max-num-seqs", "4")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    records = tmp_path / "out.jsonl.journal" / "records"
    while process.poll() is None and not (records.exists() and records.stat().st_size > 2000):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "run the same command again" in error
    assert not output.exists()
    assert main(command[3:]) == 0
    assert len(rows_by_id(output)) == len(lengths)


def test_a_journals_place_that_holds_other_files_is_left_alone(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    precious = tmp_path / "out.jsonl.journal" / "precious"
    precious.parent.mkdir()
    precious.write_text("years of work")
    for extra in ((), ("--fresh",)):
        assert main(run_args(tiny, source, output, "--quiet", *extra)) == 1
        assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in precious.parent.iterdir()] == ["precious"]
    precious.unlink()
    assert main(run_args(tiny, source, output, "--quiet")) == 0
    precious.write_text("put here later")
    assert main(run_args(tiny, source, output, "--quiet", "--fresh")) == 0
    assert precious.exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--kv-memory", "1"), "raise --kv-memory"),
        (("--threads", "100000"), "cores and takes at most"),
        (("--max-num-seqs", "100"), "raise the first or lower the second"),
    ],
)
def test_limits_that_cannot_work_are_refused_before_a_line_is_read(
    extra: tuple[str, ...], message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    assert main(run_args(tiny, source, output, *extra)) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def shell(command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run `blendserve "$@"` as `command` has it: with streams closed, full or piped."""
    script = "exec 3>&1; " + command.replace("blendserve", f"{sys.executable} -m blendserve")
    environ = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", script, "bash", *arguments], capture_output=True, env=environ, timeout=120)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ('blendserve "$@" >&-', 0),
        ('blendserve "$@" >&- 2>&- <&-', 0),
        ('blendserve "$@" 2>&1 >/dev/full', 1),
        ('blendserve "$@" | true; exit ${PIPESTATUS[0]}', 1),
        ('blendserve "$@" 2>&1 >&3 3>&- | true; exit ${PIPESTATUS[0]}', 0),
        ('blendserve "$@" 2>/dev/full', 0),
    ],
    ids=["no output", "no streams at all", "a full device", "a reader that left", "of errors", "a full one for errors"],
)
def test_whatever_becomes_of_the_streams_the_answers_are_written(
    command: str, code: int, tiny: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(f"r{i}") for i in range(3)))
    result = shell(command, *run_args(tiny, source, output))
    assert result.returncode == code
    assert b"Traceback" not in result.stdout + result.stderr
    assert sorted(rows_by_id(output)) == ["r0", "r1", "r2"]


@pytest.mark.parametrize("name", [b"\xc3\xbcn\xc3\xafc\xc3\xb6d\xc3\xa9 \xe6\x96\x87 .jsonl", b"no text \xff.jsonl"])
def test_any_name_of_a_file_will_do(name: bytes, tiny: Path, tmp_path: Path) -> None:
    source, output = tmp_path / os.fsdecode(name), tmp_path / os.fsdecode(b"out " + name)
    source.write_text(line("a"))
    for locale in ({"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        result = shell('blendserve "$@"', *run_args(tiny, source, output, "--fresh", "--quiet"), **locale)
        assert result.returncode == 0, result.stderr
        assert list(rows_by_id(output)) == ["a"]
    result = shell('blendserve "$@"', "plan", str(source), "--html", str(output) + ".html", "--model", str(tiny))
    assert result.returncode == 0, result.stderr


def test_what_the_system_refuses_is_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/secret/config.json")

    def exhaust(*_: object, **__: object) -> None:
        raise MemoryError

    for failure, message in ((refuse, "cannot use /secret/config.json: Permission denied"), (exhaust, "out of memory")):
        monkeypatch.setattr("blendserve.cli.options.resolve", failure)
        assert main(["check", str(tmp_path / "in.jsonl"), "--model", str(tiny)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_ctrl_c_before_anything_runs_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("blendserve.cli._parser", interrupt)
    assert main([]) == 130
    assert capsys.readouterr().err == "blendserve: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"blendserve {version('blendserve')}\n"

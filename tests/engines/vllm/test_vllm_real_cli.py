"""`blendserve run --engine vllm` on the installed vLLM, with what kills it; scripts/test-vllm runs this."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from batch_fakes import read_rows
from vllm_cases import chat
from vllm_real_cases import command as command_of
from vllm_real_cases import finish, model, pytestmark, start, wait_for_answers

__all__ = ["model", "pytestmark"]

NUM_LINES = 16


def command(model: Path, tmp_path: Path, *options: str) -> list[str]:
    source = tmp_path / "in.jsonl"
    lines = [
        chat(f"id-{n}", f"tell {n}", max_tokens=4 if n < 4 else 100, temperature=0, ignore_eos=True)
        for n in range(NUM_LINES)
    ]
    source.write_text("\n".join(lines))
    return command_of(model, source, tmp_path / "out.jsonl", *options)


def engine_cores_of(pid: int) -> list[int]:
    """Processes below `pid` that call themselves engine cores."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text()
            name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        except OSError:
            continue
        parents[int(path.name)] = (int(rest[1]), name)
    return [child for child, (parent, name) in parents.items() if "EngineCor" in name and parent == pid]


def test_killed_it_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    line = command(model, tmp_path, "--vllm-scheduler", "blend")
    process = start(line, tmp_path)
    wait_for_answers(process, tmp_path, 100)
    process.send_signal(signal.SIGKILL)
    process.wait()
    report = finish(start(line, tmp_path))
    assert int(str(report["num_resumed"])) > 0
    assert sorted(row["custom_id"] for row in read_rows(tmp_path / "out.jsonl")) == sorted(
        f"id-{n}" for n in range(NUM_LINES)
    )


def test_the_death_of_its_own_process_is_survived(model: Path, tmp_path: Path) -> None:
    process = start(command(model, tmp_path, "--own-process"), tmp_path)
    wait_for_answers(process, tmp_path, 100)
    cores = engine_cores_of(process.pid)
    assert cores, "vLLM runs in a process of its own"
    for core in cores:
        os.kill(core, signal.SIGKILL)
    report = finish(process)
    assert report["num_succeeded"] == NUM_LINES
    assert "1 restarts" in str(report["notes"])
    assert "opening another one" in (tmp_path / "log").read_text()


def test_replicas_answer_every_line_once(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.50'")
    report = finish(start(command(model, tmp_path, "--replicas", "2"), tmp_path))
    assert report["num_succeeded"] == NUM_LINES
    assert sorted(row["custom_id"] for row in read_rows(tmp_path / "out.jsonl")) == sorted(
        f"id-{n}" for n in range(NUM_LINES)
    )

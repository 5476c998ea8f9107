"""kill -9 and a full disk against the real command with a real (tiny) model: the files end equal to an uninterrupted
run's."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from crash_cases import batch_file, comparable
from tiny_files import tiny_directory

from blendserve.job.job import EXIT_ERROR_ROWS

NUM_KILLS = 20


def kill_at_random(command: list[str], output: Path, num_bytes: int) -> None:
    """Start the command and kill it once its journal has grown by `num_bytes`."""
    records = output.with_name(output.name + ".journal") / "records"
    before = records.stat().st_size if records.exists() else 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (records.exists() and records.stat().st_size >= before + num_bytes):
        time.sleep(0.002)
    process.kill()
    process.wait()


def run_command(model: Path, source: Path, output: Path) -> list[str]:
    limits = ["--kv-memory", "4MiB", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--threads", "2"]
    files = [str(source), "-o", str(output), "--model", str(model)]
    return [sys.executable, "-m", "blendserve", "run", *files, *limits]


@pytest.mark.slow
def test_kill_9_at_twenty_moments_loses_and_repeats_nothing(tmp_path: Path) -> None:
    model = tiny_directory(tmp_path / "tiny")
    source = batch_file(tmp_path / "in.jsonl")
    command = partial(run_command, model, source)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert subprocess.run(command(whole), capture_output=True).returncode == EXIT_ERROR_ROWS
    moments = random.Random(11)
    most_per_run = whole.stat().st_size / NUM_KILLS
    for _ in range(NUM_KILLS):
        kill_at_random(command(killed), killed, round(moments.uniform(0, most_per_run)))
    assert not killed.exists(), "the job was done before the last kill"
    assert subprocess.run(command(killed), capture_output=True).returncode == EXIT_ERROR_ROWS
    assert comparable(killed) == comparable(whole)
    errors = [path.with_name(path.stem + ".errors.jsonl") for path in (whole, killed)]
    assert comparable(errors[0]) == comparable(errors[1])
    assert len(comparable(errors[0])) == 4


def in_namespace(script: str) -> list[str]:
    """A shell that may mount file systems of its own, which end with it."""
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script]


def can_mount(directory: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(in_namespace(f"mount -t tmpfs none {directory}"), capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("kibibytes", "stage"), [(24, "reading"), (96, "answering"), (180, "writing the files")])
def test_a_disk_that_fills_up_ends_the_run_and_a_rerun_goes_on(tmp_path: Path, kibibytes: int, stage: str) -> None:
    """A small file system of its own: full while the input is read, while requests run, or at the very end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not can_mount(disk):
        pytest.skip("mounting a file system is not possible here")
    model, source = tiny_directory(tmp_path / "tiny"), batch_file(tmp_path / "in.jsonl", most_tokens=40)
    whole, found = tmp_path / "whole.jsonl", tmp_path / "found"
    found.mkdir()
    assert subprocess.run(run_command(model, source, whole), capture_output=True).returncode == EXIT_ERROR_ROWS
    run = shlex.join([*run_command(model, source, disk / "out.jsonl"), "--json"])
    script = f"""
        mount -t tmpfs -o size={kibibytes}k none {disk}
        {run}; echo "exit $?"
        cd {disk}; ls . out.jsonl.journal
        mount -o remount,size=16m {disk}
        {run}; echo "exit $?"
        cp *.jsonl {found}
    """
    result = subprocess.run(in_namespace(script), capture_output=True, text=True, timeout=300)
    assert "no space left" in result.stderr
    assert "run the same command again" in result.stderr
    assert "Traceback" not in result.stderr
    first, *left, summary, second = result.stdout.splitlines()
    assert (first, second) == ("exit 1", "exit 3")
    assert not {"out.jsonl", "out.errors.jsonl"} & set(left), "half a file stands there"
    assert ("header.json" in left) == (stage != "reading")
    report = json.loads(summary)
    assert (report["num_resumed"] > 0) == (stage != "reading")
    assert (report["num_output_tokens"] > 0) == (stage != "writing the files")
    for name in ("whole.jsonl", "whole.errors.jsonl"):
        assert comparable(found / name.replace("whole", "out")) == comparable(tmp_path / name)

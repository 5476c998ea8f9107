"""kill -9 at random moments on a cluster of several raylets: actors, raylets, drivers. Nothing is lost or doubled."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash_cases import batch_file, comparable
from ray_cases import STORE_BYTES, children_of, ray_cluster, raylet_of
from tiny_files import tiny_directory

from blendserve.job.job import EXIT_ERROR_ROWS

NUM_KILLS = 10
NUM_REPLICAS = 2
NODE_CPUS = 2
LIMITS = ("--kv-memory", "4MiB", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--threads", "1", "--quiet")


class Run:
    """A job that is run again whenever its driver has died, and the cluster that it runs on."""

    def __init__(self, cluster: Any, command: list[str], output: Path, log: Path) -> None:
        self.records = output.with_name(output.name + ".journal") / "records"
        self.output = output
        self.log = log
        self.num_starts = 0
        self._cluster = cluster
        self._command = command
        self._driver: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self._driver is not None:
            self._driver.kill()
            self._driver.wait()

    @property
    def num_bytes(self) -> int:
        return self.records.stat().st_size if self.records.exists() else 0

    def driver(self) -> subprocess.Popen[bytes]:
        """The driver, started anew where there is none."""
        if self._driver is None or self._driver.poll() is not None:
            self.num_starts += 1
            with self.log.open("ab") as log:
                self._driver = subprocess.Popen(self._command, stdout=log, stderr=log)
        return self._driver

    def wait_for_bytes(self, num_bytes: int) -> bool:
        """Wait until the journal has grown to so much. Returns: False when the job was done before."""
        while self.num_bytes < num_bytes:
            self.driver()
            if self.output.exists():
                return False
            time.sleep(0.01)
        return True

    def kill_actor(self, moments: random.Random) -> bool:
        """Returns: whether there was one."""
        nodes = self._cluster.list_all_nodes()
        actors = [pid for node in nodes for pid, name in children_of(raylet_of(node)).items() if "ray::Replica" in name]
        return bool(actors) and _kill(moments.choice(actors))

    def kill_raylet(self, moments: random.Random) -> bool:
        """Kill a machine and add another."""
        node = moments.choice([node for node in self._cluster.list_all_nodes() if node is not self._cluster.head_node])
        _kill(raylet_of(node))
        self._cluster.remove_node(node, allow_graceful=False)
        self._cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=STORE_BYTES, wait=False)
        return True

    def kill_driver(self, moments: random.Random) -> bool:  # noqa: ARG002
        driver = self.driver()
        driver.kill()
        driver.wait()
        return True


def _kill(process: int) -> bool:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ten_kills_of_actors_raylets_and_drivers(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.50'")
    model = tiny_directory(tmp_path / "tiny")
    with ray_cluster(0, [NODE_CPUS, NODE_CPUS]) as cluster:
        # A fast machine may finish a short job before the last kill: it gets a longer one.
        assert any(is_killed_ten_times(cluster, model, tmp_path / str(num), num) for num in (160, 640, 2560, 10240))


def is_killed_ten_times(cluster: Any, model: Path, directory: Path, num_lines: int) -> bool:
    """Run a job of so many lines, kill ten times and compare its rows with those of a run in one process.

    Returns: False where the job was done before the last kill.
    """
    directory.mkdir()
    source = batch_file(directory / "in.jsonl", num_lines=num_lines)
    whole, output, log = directory / "whole.jsonl", directory / "out.jsonl", directory / "log"

    def command(output: Path, *extra: str) -> list[str]:
        names = ["run", str(source), "-o", str(output), "--model", str(model)]
        return [sys.executable, "-m", "blendserve", *names, *LIMITS, *extra]

    assert subprocess.run(command(whole), capture_output=True).returncode == EXIT_ERROR_ROWS
    replicas = ("--replicas", str(NUM_REPLICAS), "--ray-address", cluster.address, "--max-restarts", "20")
    with Run(cluster, command(output, *replicas), output, log) as run:
        if not kill_in_turn(run, random.Random(6), whole.stat().st_size / (NUM_KILLS + 2)):
            return False
        assert run.driver().wait() == EXIT_ERROR_ROWS, log.read_text()
    assert comparable(output) == comparable(whole)
    errors = [path.with_name(path.stem + ".errors.jsonl") for path in (whole, output)]
    assert comparable(errors[0]) == comparable(errors[1])
    texts = [text for path in (output, errors[1]) for text in path.read_text().splitlines()]
    ids = Counter(json.loads(text)["custom_id"] for text in texts)
    assert len(ids) == ids.total() == num_lines
    return True


def kill_in_turn(run: Run, moments: random.Random, bytes_between: float) -> bool:
    """Kill after up to so many more bytes of answers each. Returns: False when the job was done before the last one."""
    kills: list[Callable[[random.Random], bool]] = [run.kill_actor, run.kill_raylet, run.kill_driver]
    order = [kills[number % 3] for number in range(NUM_KILLS)]
    moments.shuffle(order)
    num_kills: Counter[str] = Counter()
    for kill in order:
        more_bytes = round(moments.uniform(0.1, 1) * bytes_between)
        if not run.wait_for_bytes(run.num_bytes + more_bytes):
            return False
        while not kill(moments):
            if run.output.exists():
                return False
            time.sleep(0.02)
        num_kills[kill.__name__] += 1
    assert num_kills == {"kill_actor": 4, "kill_raylet": 3, "kill_driver": 3}
    return True

"""A Ray cluster of several raylets on this machine, bound to loopback, and the processes that belong to it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
STORE_BYTES = 100 << 20
_SETTINGS = {
    "health_check_initial_delay_ms": 1000,  # quick to notice
    "health_check_period_ms": 1000,
    "prestart_worker_first_driver": False,  # cheap to start
    "enable_worker_prestart": False,
}


@contextmanager
def ray_cluster(num_head_cpus: int, num_cpus_by_node: Sequence[int]) -> Iterator[Any]:
    """A head and further raylets with so many CPUs, from whose workers the tests can be imported.

    Asserts that no process of it is left.
    """
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install 'ray>=2.50'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
        patch.setenv("PYTHONPATH", str(TESTS))
        head = {
            "num_cpus": num_head_cpus,
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            "_system_config": _SETTINGS,
        }
        terminate = signal.getsignal(signal.SIGTERM)
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        session = cluster.head_node.get_session_dir_path()
        try:
            for num_cpus in num_cpus_by_node:
                cluster.add_node(num_cpus=num_cpus, object_store_memory=STORE_BYTES, wait=False)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            cluster.shutdown()
            signal.signal(signal.SIGTERM, terminate)
        assert_nothing_left(session)


def assert_nothing_left(session: str) -> None:
    """No process names the session any more. Workers end by themselves when their raylet is gone."""
    for _ in range(300):
        left = processes_of(session)
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"processes are left: {left}")


def processes_of(session: str) -> dict[int, str]:
    """Command line by process id, of all that name a session directory of Ray in command line or environment."""
    found = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit() or int(directory.name) == os.getpid():
            continue
        try:
            texts = [(directory / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ")]
        except OSError:
            continue
        if any(session in text for text in texts):
            found[int(directory.name)] = texts[0].replace("\0", " ")
    return found


def children_of(parent: int) -> dict[int, str]:
    """Command line by process id."""
    found = {}
    for directory in Path("/proc").iterdir():
        try:
            if directory.name.isdigit() and f"\nPPid:\t{parent}\n" in (directory / "status").read_text():
                found[int(directory.name)] = (directory / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
    return found


def raylet_of(node: Any) -> int:
    """Process id of a node's raylet."""
    return int(node.all_processes["raylet"][0].process.pid)

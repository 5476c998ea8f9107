"""A Ray cluster to run replicas on: one that is there, or one of this machine alone, started for the run."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from blendserve.engines.settings import ReplicaSettings
from blendserve.errors import ConfigError
from blendserve.host import usable_cores

_REACH_S = 10.0
_STORE_SLACK_BYTES = 256 << 20  # for replies that are too large to travel inside of messages
_NO_TELEMETRY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# On every system, despite its name: Ray that cannot be a cluster of several machines binds its ports to loopback.
_ONE_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


class NodeShape(NamedTuple):
    """What a machine of the cluster has."""

    num_cpus: float
    num_gpus: float


class ReplicaShape(NamedTuple):
    """What a replica gets of its machine, and how many may come to share one."""

    num_cpus: float
    num_gpus: float
    num_on_node: int


def import_ray() -> Any:
    """Raises: ConfigError with the command that installs it."""
    try:
        import ray
    except ImportError:
        raise ConfigError("--replicas needs Ray, which is not installed: pip install 'ray>=2.50'") from None
    return ray


@contextmanager
def open_cluster(address: str | None, store_bytes: int) -> Iterator[Any]:
    """Connect to Ray, yield the module, and disconnect. A cluster of this machine alone ends with the block, or with
    this process, however that ends. `store_bytes`: what replicas are to share.

    Raises: ConfigError when Ray is missing or cannot be reached.
    """
    ray = import_ray()
    _check_address(address)
    before = _sigterm_handler()
    try:
        _connect(ray, address, store_bytes)
    except Exception as error:  # Ray raises what it likes, a bare Exception too
        where = f"no Ray cluster at {address}" if address else "Ray does not start on this machine"
        remedy = "see `ray status`" if address else "its logs are below /tmp/ray/session_latest"
        raise ConfigError(f"{where}: {first_line(error)}; {remedy}") from error
    try:
        _restore_sigterm(before)
        yield ray
    finally:
        ray.shutdown()


def first_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def node_shapes(ray: Any) -> list[NodeShape]:
    """The machines of the cluster that are alive."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [NodeShape(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in resources]


def replica_shape(settings: ReplicaSettings, nodes: Sequence[NodeShape]) -> ReplicaShape:
    """What each replica gets, so that all have a place. Raises: ConfigError when they have none, and Ray could not find
    more machines."""
    num_cpus = settings.num_cpus
    if num_cpus is None:
        most = int(max((node.num_cpus for node in nodes), default=0))
        fitting = (cpus for cpus in range(most, 0, -1) if _places(nodes, cpus, settings) >= settings.num_replicas)
        num_cpus = next(fitting, None)
    if num_cpus is None or (not settings.ray_address and _places(nodes, num_cpus, settings) < settings.num_replicas):
        have = " + ".join(f"{node.num_cpus:g} CPUs, {node.num_gpus:g} GPUs" for node in nodes)
        raise ConfigError(
            f"{settings.num_replicas} replicas of {num_cpus or 1:g} CPUs and {settings.num_gpus:g} GPUs do not fit "
            f"on {have}; lower --replicas, --replica-cpus or --replica-gpus"
        )
    on_node = max((_places([node], num_cpus, settings) for node in nodes), default=1)
    return ReplicaShape(num_cpus, settings.num_gpus, max(1, min(on_node, settings.num_replicas)))


def _places(nodes: Sequence[NodeShape], num_cpus: float, settings: ReplicaSettings) -> int:
    total = 0
    for node in nodes:
        by_cpu = int(node.num_cpus / num_cpus) if num_cpus else settings.num_replicas
        by_gpu = int(node.num_gpus / settings.num_gpus) if settings.num_gpus else settings.num_replicas
        total += min(by_cpu, by_gpu)
    return total


def _check_address(address: str | None) -> None:
    """Ray tries for minutes to reach an address where nobody is. Raises: ConfigError."""
    if address is None:
        return
    if "://" in address:
        raise ConfigError(
            f"--ray-address {address} is an address of Ray's remote client, which is not supported; run blendserve on "
            "a machine of the cluster with --ray-address auto"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_REACH_S).close()
        except OSError as error:
            raise ConfigError(f"no Ray cluster at {address}: {error.strerror or error}; see `ray status`") from None


def _connect(ray: Any, address: str | None, store_bytes: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    os.environ.update(_NO_TELEMETRY)
    if address is not None:
        ray.init(address=address, **options)
    else:
        os.environ.update(_ONE_MACHINE)  # for Ray's processes; this one reads it again, or it is too late
        with suppress(AttributeError):
            ray._raylet.Config.initialize("")
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
        ray.init(
            address="local",  # never one that the environment names
            num_cpus=usable_cores(),
            include_dashboard=False,
            object_store_memory=store_bytes + store_bytes // 8 + _STORE_SLACK_BYTES,
            **options,
        )
    # Ray tells of processes that die on standard output, where only the summary belongs; we tell of them ourselves.
    ray._private.worker._worker_logs_enabled = False


def _sigterm_handler() -> Any:
    return signal.getsignal(signal.SIGTERM) if threading.current_thread() is threading.main_thread() else None


def _restore_sigterm(handler: Any) -> None:
    """Ray ends the process at SIGTERM on the spot; a job wants to stop in good order."""
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)

"""Replicas as one engine: a job is answered by copies of another engine, each in a process of its own on Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from blendserve.dialect.endpoint import Codec
from blendserve.dialect.schema import ServedModel
from blendserve.engines.base import Engine, EngineStatus, EngineTimes, Notify
from blendserve.engines.replicas.cluster import ReplicaShape, import_ray
from blendserve.engines.replicas.ledger import Phase
from blendserve.engines.replicas.pool import ReplicaPool
from blendserve.engines.replicas.ray_fleet import Expected
from blendserve.engines.settings import HttpSettings, NativeSettings, ReplicaSettings, SingleSettings, VllmSettings
from blendserve.errors import ConfigError
from blendserve.job.pending import PendingRequests
from blendserve.planner.plan import Plan
from blendserve.request import SequenceOutput

OpenSingle = Callable[..., Engine]
"""`engines.opening.open_single`, handed in: it is pickled by its name on the way to the replicas."""


def check_gpus(settings: ReplicaSettings) -> None:
    """Raises: ConfigError. Where Ray hands out no GPUs, every process sees all of them, and vLLM takes the first."""
    from blendserve.engines.vllm.api import is_cpu_build

    if not isinstance(settings.engine, VllmSettings) or is_cpu_build():
        return
    num_ranks = settings.engine.arguments.get("tensor_parallel_size", 1)
    if isinstance(num_ranks, int) and settings.num_gpus < num_ranks > 1:
        raise ConfigError(
            f"--replica-gpus {settings.num_gpus:g} is too few for tensor_parallel_size={num_ranks} in each replica: "
            f"add --replica-gpus {num_ranks}"
        )
    if not settings.num_gpus:
        raise ConfigError(
            "--replica-gpus 0 lets each replica of vLLM see all GPUs of its machine, and all would open the first: add "
            "--replica-gpus 1, or as many as tensor_parallel_size"
        )


def cpus_of_each(settings: ReplicaSettings) -> ReplicaSettings:
    """The same with the CPUs that follow from the engine, where they were left open: a client of a server needs one,
    others as many as they have threads."""
    if settings.num_cpus is not None:
        return settings
    engine = settings.engine
    num_cpus = 1.0 if isinstance(engine, HttpSettings) else engine.num_threads or None
    return replace(settings, num_cpus=num_cpus)


def settings_elsewhere(settings: SingleSettings, opened: Mapping[str, Any]) -> SingleSettings:
    """An engine's settings as another machine needs them: paths in full, and kernels as this machine has chosen them.
    `opened` are the settings of the engine here."""
    model = None if settings.model is None else _in_full(settings.model)
    if isinstance(settings, NativeSettings):
        return replace(settings, model=model, isa=opened.get("isa", settings.isa))
    if isinstance(settings, HttpSettings):
        tokenizer = None if settings.tokenizer is None else _in_full(settings.tokenizer)
        return replace(settings, model=model, tokenizer=tokenizer)
    adapters = {name: str(Path(path).resolve()) for name, path in settings.adapters.items()}
    return replace(settings, model=_in_full(settings.model), adapters=adapters)


def _in_full(name: str) -> str:
    """The whole path of a file or directory that is here; other names as they are."""
    return str(Path(name).resolve()) if Path(name).exists() else name


class EngineOfReplica:
    """An engine with the policy that a job is run by: what a replica works with."""

    def __init__(self, engine: Engine, policy: str) -> None:
        self.identity = engine.identity
        self.settings = engine.settings
        self._engine = engine
        self._policy = policy

    def generate(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        return self._engine.generate(pending, self._policy)

    def close(self) -> None:
        self._engine.close()


def open_replica(
    open_single: OpenSingle, settings: SingleSettings, policy: str, shape: ReplicaShape
) -> EngineOfReplica:
    """The engine of one replica with its share of the machine, in the replica's process. Raises: ConfigError."""
    if not isinstance(settings, HttpSettings):
        num_threads = settings.num_threads or max(1, int(shape.num_cpus))
        settings = replace(settings, num_threads=num_threads, memory_share=1 / shape.num_on_node)
    return EngineOfReplica(open_single(settings), policy)


class ReplicatedEngine:
    """An `Engine` of copies. The engine that is open here only plans."""

    def __init__(self, settings: ReplicaSettings, open_single: OpenSingle, *, notify: Notify) -> None:
        check_gpus(settings)
        self._planner = open_single(settings.engine, notify=notify)
        import_ray()
        self.times = EngineTimes()
        self.stats = None
        self._settings = cpus_of_each(settings)
        self._open_single = open_single
        self._notify = notify
        self._pool: ReplicaPool | None = None
        self._plan: Plan | None = None

    @property
    def served(self) -> ServedModel:
        return self._planner.served

    @property
    def codec(self) -> Codec:
        return self._planner.codec

    @property
    def identity(self) -> str:
        return self._planner.identity

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._planner.settings

    @property
    def capacity_bytes(self) -> int:
        return self._planner.capacity_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """How even the parts were, and what moved between replicas."""
        ledger, parts = (self._pool.ledger, self._pool.partition) if self._pool is not None else (None, None)
        if ledger is None or parts is None:
            return self._planner.notes
        return (
            *self._planner.notes,
            f"{len(ledger.replicas)} replicas: planned load even within {parts.imbalance:.1%}, cuts cost "
            f"{parts.sharing_lost:.1%} of prompt tokens, {ledger.num_stolen} requests moved, "
            f"{ledger.num_losses} processes lost",
        )

    def generate(self, pending: PendingRequests, policy: str) -> Iterator[SequenceOutput]:
        """Yield the ends of `pending` as they come from any replica."""
        started_s = time.perf_counter()
        plan = self.plan(pending)
        planned_s = time.perf_counter()
        self.times = EngineTimes(plan_s=planned_s - started_s)
        pool = self._pool = self._new_pool(policy)
        self._plan = plan
        try:
            yield from pool.run(pending, plan)
        finally:
            run_s = time.perf_counter() - planned_s - pool.startup_s
            self.times = self.times._replace(load_s=pool.startup_s, run_s=run_s)

    def plan(self, pending: PendingRequests) -> Plan:
        return self._planner.plan(pending)

    def status(self) -> EngineStatus | None:
        """How many replicas work."""
        plan, ledger = self._plan, self._pool.ledger if self._pool is not None else None
        if plan is None:
            return None
        return EngineStatus(
            num_running=ledger.num_in(Phase.BUSY) if ledger else 0,
            num_expected_tokens=float(plan.expected_output_tokens.sum() + plan.table.num_prompt_tokens.sum()),
            unit="replicas busy",
        )

    def close(self) -> None:
        """Replicas end with `generate`."""
        self._planner.close()

    def _tell_if_down(self) -> None:
        """Replicas wait for a server that is down, and nobody hears what they say meanwhile."""
        engine = self._settings.engine
        if not isinstance(engine, HttpSettings):
            return
        from blendserve.engines.http.reach import why_unreachable

        if (reason := why_unreachable(engine.base_url)) is not None:
            self._notify(
                f"{engine.base_url} does not answer from here ({reason}); replicas try for {engine.max_outage_s:.0f} s"
            )

    def _new_pool(self, policy: str) -> ReplicaPool:
        planner = self._planner
        self._tell_if_down()
        sent = settings_elsewhere(self._settings.engine, planner.settings)
        return ReplicaPool(
            self._settings,
            partial(open_replica, self._open_single, sent, policy),
            Expected(planner.identity, planner.settings),
            is_restartable=not isinstance(sent, HttpSettings),  # a new process meets the same server
            notify=self._notify,
        )

"""`--replicas N`: the job is answered by N copies of an engine; any engine, each in a process of its own."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from blendserve.cli.engines import EngineRun, open_one
from blendserve.cli.options import tell
from blendserve.dialect.responses import Codec
from blendserve.dialect.schema import ServedModel
from blendserve.engines.replicas.cluster import ReplicaSettings, ReplicaShape, import_ray
from blendserve.engines.replicas.ledger import Phase
from blendserve.engines.replicas.pool import ReplicaPool
from blendserve.engines.replicas.ray_fleet import Expected
from blendserve.errors import ConfigError
from blendserve.job.job import JobProgress
from blendserve.job.pending import PendingRequests
from blendserve.planner.plan import Plan
from blendserve.report.progress import Progress, Snapshot
from blendserve.request import SequenceOutput


def replica_settings(args: argparse.Namespace) -> ReplicaSettings:
    """What the arguments say of replicas. Raises: ConfigError when copies of vLLM would take each other's GPU."""
    if args.engine == "vllm":
        _check_gpus(args)
    num_cpus: float | None = args.replica_cpus
    if num_cpus is None:
        num_cpus = 1.0 if args.engine == "http" else args.threads or None
    return ReplicaSettings(
        num_replicas=args.replicas,
        ray_address=args.ray_address,
        num_cpus=num_cpus,
        num_gpus=args.replica_gpus,
        placement=args.placement,
        max_restarts=args.max_restarts,
    )


def _check_gpus(args: argparse.Namespace) -> None:
    """Raises: ConfigError. Where Ray hands out no GPUs, every process sees all of them, and vLLM takes the first."""
    from blendserve.cli.vllm_run import parse_argument
    from blendserve.engines.vllm.api import is_cpu_build

    if is_cpu_build():
        return
    num_ranks = dict(parse_argument(text) for text in args.vllm_arg).get("tensor_parallel_size", 1)
    if isinstance(num_ranks, int) and args.replica_gpus < num_ranks > 1:
        raise ConfigError(
            f"--replica-gpus {args.replica_gpus:g} is too few for tensor_parallel_size={num_ranks} in each replica: "
            f"add --replica-gpus {num_ranks}"
        )
    if not args.replica_gpus:
        raise ConfigError(
            "--replica-gpus 0 lets each replica of vLLM see all GPUs of its machine, and all would open the first: add "
            "--replica-gpus 1, or as many as tensor_parallel_size"
        )


def replica_arguments(args: argparse.Namespace, settings: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments as another machine needs them: paths in full, kernels as chosen here, nothing on the terminal."""
    values = dict(vars(args)) | {"isa": settings.get("isa", args.isa), "quiet": True, "replicas": None}
    del values["command"]
    for name in ("model", "tokenizer"):
        if values[name] is not None and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())
    values["lora"] = [_in_full(option) for option in args.lora]
    return argparse.Namespace(**values)


def _in_full(option: str) -> str:
    """NAME=PATH with the whole path."""
    name, separator, path = option.partition("=")
    return f"{name}{separator}{Path(path).resolve() if path else path}"


def open_replica(args: argparse.Namespace, shape: ReplicaShape) -> EngineRun:
    """The engine of one replica, in the replica's process. Raises: ConfigError."""
    values = dict(vars(args)) | {
        "threads": args.threads or max(1, int(shape.num_cpus)),
        "memory_share": 1 / shape.num_on_node,
    }
    return open_one(argparse.Namespace(**values))


class ReplicatedRun:
    """An engine's part of a job, done by copies of `engine`, which itself only plans."""

    def __init__(self, args: argparse.Namespace, engine: EngineRun) -> None:
        import_ray()
        self.load_s = self.plan_s = self.run_s = 0.0
        self.stats = None
        self._engine = engine
        self._is_quiet: bool = args.quiet or args.json
        self._progress = JobProgress(0, 0)
        self._pool = ReplicaPool(
            replica_settings(args),
            partial(open_replica, replica_arguments(args, engine.settings)),
            Expected(engine.identity, engine.settings),
            is_restartable=args.engine != "http",  # it has retried itself: a new process meets the same server
            notify=tell,
        )

    @property
    def served(self) -> ServedModel:
        return self._engine.served

    @property
    def codec(self) -> Codec:
        return self._engine.codec

    @property
    def identity(self) -> str:
        return self._engine.identity

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._engine.settings

    @property
    def notes(self) -> tuple[str, ...]:
        """How even the parts were, and what moved between replicas."""
        ledger, parts = self._pool.ledger, self._pool.partition
        if ledger is None or parts is None:
            return self._engine.notes
        return (
            *self._engine.notes,
            f"{len(ledger.replicas)} replicas: planned load even within {parts.imbalance:.1%}, cuts cost "
            f"{parts.sharing_lost:.1%} of prompt tokens, {ledger.num_stolen} requests moved, "
            f"{ledger.num_losses} processes lost",
        )

    def note(self, progress: JobProgress) -> None:
        """Take the job's count of what is done."""
        self._progress = progress

    def plan(self, pending: PendingRequests) -> Plan:
        return self._engine.plan(pending)

    def generate(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        """Yield the ends of `pending` as they come from any replica."""
        started_s = time.perf_counter()
        plan = self.plan(pending)
        planned_s = time.perf_counter()
        self.plan_s = planned_s - started_s
        try:
            with Progress(lambda: self._snapshot(plan), is_quiet=self._is_quiet):
                yield from self._pool.run(pending, plan)
        finally:
            self.load_s = self._pool.startup_s
            self.run_s = time.perf_counter() - planned_s - self.load_s

    def close(self) -> None:
        """Replicas end with `generate`."""
        self._engine.close()

    def _snapshot(self, plan: Plan) -> Snapshot:
        progress, ledger = self._progress, self._pool.ledger
        num_tokens = progress.num_prompt_tokens + progress.num_output_tokens
        expected = float(plan.expected_output_tokens.sum() + plan.table.num_prompt_tokens.sum())
        return Snapshot(
            num_done=progress.num_done,
            num_requests=progress.num_requests,
            num_tokens=num_tokens,
            num_expected_tokens=max(0.0, expected - num_tokens),
            num_running=ledger.num_in(Phase.BUSY) if ledger else 0,
            kv_use=None,
            prefix_hit_rate=progress.num_cached_tokens / max(1, progress.num_prompt_tokens),
            unit="replicas busy",
        )

"""`--engine native`: the job is answered on this machine's CPU."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from blendserve.cli.observe import RunObserver
from blendserve.cli.options import engine_config, find_model, identity_of, notes_of, served_model, tell
from blendserve.config import EngineConfig
from blendserve.costs.model_cost import CostModel
from blendserve.costs.this_machine import cost_of
from blendserve.dialect.codec import ModelCodec
from blendserve.engine.limits import resolve_limits
from blendserve.engine.loop import EngineLoop
from blendserve.engine.planned import run_planned, run_windowed
from blendserve.engine.stats import RunStats
from blendserve.engines.native.loop import open_executor
from blendserve.executors.native import KERNEL_REVISION, NativeExecutor, best_isa
from blendserve.job.job import JobProgress
from blendserve.job.pending import PendingRequests, plan_pending
from blendserve.models.detokenize import StopChecker
from blendserve.models.load import LoadedModel, load_model
from blendserve.planner.plan import Plan
from blendserve.planner.windows import Window
from blendserve.report.progress import Progress, Snapshot
from blendserve.request import SequenceOutput


def open_native_run(args: argparse.Namespace) -> NativeRun:
    """Open the model's files; its weights are loaded when there is something to run. Raises: ConfigError, and
    CapacityError where the KV memory asked for holds nothing: before a large file is read rather than after."""
    config = engine_config(args)
    files = find_model(args)
    model = load_model(files)
    resolve_limits(config, model.spec)
    return NativeRun(args, config, model, identity_of(model.spec.name, files), notes_of(files))


class NativeRun:
    """The engine's part of a job: opened only when requests are left to run, timed, and watched."""

    def __init__(
        self, args: argparse.Namespace, config: EngineConfig, model: LoadedModel, identity: str, notes: tuple[str, ...]
    ) -> None:
        self.served = served_model(args, model)
        self.codec = ModelCodec(model.tokenizer, self.served.max_model_len)
        self.identity = identity
        self._isa: str = best_isa() if args.isa == "auto" else args.isa  # kernels round differently: never mix them
        self.settings = {"isa": self._isa, "dtype": config.dtype, "kernels": KERNEL_REVISION}
        self.notes = notes
        self.load_s = self.plan_s = self.run_s = 0.0
        self.stats: RunStats | None = None
        self._model = model
        self._config = config
        self._policy: str = args.policy
        self._window: int = args.window
        self._is_quiet: bool = args.quiet or args.json
        self._observer = RunObserver(args.input.name, args.trace, args.report)
        self._progress = JobProgress(0, 0)
        self._opened: tuple[NativeExecutor, EngineLoop] | None = None

    def note(self, progress: JobProgress) -> None:
        """Take the job's count of what is done."""
        self._progress = progress

    def generate(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        """Yield the outputs of `pending` as they finish."""
        started_s = time.perf_counter()
        executor, engine = self._opened = self._opened or self._open()
        loaded_s = time.perf_counter()
        plan = None if self._window else self.plan(pending)
        planned_s = time.perf_counter()
        self.load_s, self.plan_s = loaded_s - started_s, planned_s - loaded_s
        outputs: Iterator[SequenceOutput]
        if plan is None:
            outputs = run_windowed(engine, pending, windows_of(pending, self._window), self._cost(), self._policy)
        else:
            outputs = run_planned(engine, pending, plan, self._policy)
        try:
            with Progress(lambda: self._snapshot(engine, plan, len(pending)), is_quiet=self._is_quiet):
                yield from outputs
        finally:
            self.run_s = time.perf_counter() - planned_s
            engine.stats.resources = self._observer.resources(executor)
            self.stats = engine.stats
            self.notes += self._observer.write(self._model.spec.name, self._policy, executor, engine.stats, plan)

    def plan(self, pending: PendingRequests) -> Plan:
        """The order of `pending` on this machine."""
        return plan_pending(pending, pending.table(), self._cost())

    def close(self) -> None:
        """Give the weights and the KV memory back."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def _open(self) -> tuple[NativeExecutor, EngineLoop]:
        config = resolve_limits(self._config, self._model.spec)
        executor = open_executor(self._model, config, isa=self._isa, trace=self._observer.steps)
        return executor, EngineLoop(executor, config, stop_checker=StopChecker(self._model.tokenizer))

    def _cost(self) -> CostModel:
        config = resolve_limits(self._config, self._model.spec)
        return cost_of(self._model.spec, config.num_threads, tell, config.dtype)

    def _snapshot(self, engine: EngineLoop, plan: Plan | None, num_pending: int) -> Snapshot:
        stats, progress = engine.stats, self._progress
        num_tokens = stats.num_prefill_tokens + stats.num_decode_tokens
        num_left = progress.num_requests - progress.num_done
        if plan is None:  # what is not planned yet will be like what has finished
            expected = num_tokens * num_pending / max(1, num_pending - num_left)
        else:
            expected = float(plan.expected_output_tokens.sum()) + plan.tree.num_unique_tokens
        return Snapshot(
            num_done=progress.num_done,
            num_requests=progress.num_requests,
            num_tokens=num_tokens,
            num_expected_tokens=max(0.0, expected - num_tokens),
            num_running=engine.batcher.table.num_running,
            kv_use=1 - engine.batcher.free_tokens / engine.batcher.capacity_tokens,
            prefix_hit_rate=stats.prefix_hit_rate,
        )


def windows_of(pending: PendingRequests, size: int) -> Iterator[Window]:
    """The requests in the order of the file, `size` at a time, read when they are asked for."""
    for begin in range(0, len(pending), size):
        part = PendingRequests(pending.store, pending.numbers[begin : begin + size])
        yield Window(part.flat_prompts(), part.table())

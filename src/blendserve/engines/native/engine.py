"""The native engine's part of a job: this machine's CPU, opened only when requests are left to run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from blendserve.calibration.first_run import expected_work_s
from blendserve.config import BLOCK_SIZE
from blendserve.costs.model_cost import CostModel
from blendserve.costs.stored_calibration import Calibration, machine_name, matching_calibration
from blendserve.costs.this_machine import built_in_cost, cost_of, peaks_of
from blendserve.dialect.codec import ModelCodec
from blendserve.dialect.schema import ServedModel
from blendserve.engine.front import Front, NothingPlanned
from blendserve.engine.limits import resolve_limits
from blendserve.engine.loop import EngineLoop
from blendserve.engine.planned import run_planned, run_windowed
from blendserve.engine.stats import Resources, RunStats
from blendserve.engines.base import EngineStatus, EngineTimes, Notify, RunObserver
from blendserve.engines.native.loop import calibrate_executor, open_executor, open_loop
from blendserve.engines.native.measured import MeasuredRun
from blendserve.engines.native.served import served_model_of
from blendserve.engines.settings import NativeSettings
from blendserve.executors.native import KERNEL_REVISION, NativeExecutor, best_isa, op_names
from blendserve.executors.prompt_results import kept_bytes_per_block
from blendserve.executors.trace import StepTrace
from blendserve.host import cache_dir, peak_rss_bytes, process_age_s
from blendserve.job.pending import PendingRequests, plan_pending
from blendserve.models.fingerprint import identity_of
from blendserve.models.generation_config import note_of, shown_defaults
from blendserve.models.hub import resolve
from blendserve.models.load import LoadedModel, load_model
from blendserve.planner.plan import Plan, make_plan
from blendserve.planner.tree import PrefixTree
from blendserve.planner.windows import Window
from blendserve.request import SequenceOutput


def open_native(settings: NativeSettings, *, notify: Notify, observer: RunObserver | None = None) -> NativeEngine:
    """Open the model's files; its weights are loaded when there is something to run. Raises: ConfigError, and
    CapacityError where the KV memory asked for holds nothing: before a large file is read rather than after."""
    files = resolve(settings.model, cache_dir(), notify=notify, revision=settings.revision)
    model = load_model(files)
    model = replace(model, tokenizer=settings.chat.applied(model.tokenizer))
    resolve_limits(settings.config(), model.spec)
    served = served_model_of(settings, files, model)
    engine = NativeEngine(settings, model, identity_of(served.name, files), served, notify=notify, observer=observer)
    engine.notes = (*files.notes, *model.spec.notes, *note_of(served.default_sampling))
    return engine


class NativeEngine:
    """An `Engine` on the native executor, planned as a whole or window by window."""

    def __init__(
        self,
        settings: NativeSettings,
        model: LoadedModel,
        identity: str,
        served: ServedModel,
        *,
        notify: Notify,
        observer: RunObserver | None = None,
    ) -> None:
        self._config = settings.config()
        self.served = served
        self.codec = ModelCodec(
            model.tokenizer,
            served.max_model_len,
            served.abilities.chat,
            obeys_control_tokens=settings.chat.obeys_control_tokens,
        )
        self.identity = identity
        self._isa = best_isa() if settings.isa == "auto" else settings.isa  # kernels round differently: never mix them
        self.settings = {
            "isa": self._isa,
            "dtype": self._config.dtype,
            "kv_dtype": self._config.kv_dtype,
            "kernels": KERNEL_REVISION,
            "generation config": shown_defaults(served.default_sampling),
            **settings.chat.identity(),
        }
        self.capacity_bytes = settings.kv_memory_bytes or 0
        self.notes: tuple[str, ...] = ()
        self.times = EngineTimes()
        self.stats: RunStats | None = None
        self.front: Front | None = None
        self._model = model
        self._window = settings.window
        self._notify = notify
        self._observer = observer
        self._trace = observer.trace if observer is not None else StepTrace()
        self._opened: tuple[NativeExecutor, EngineLoop] | None = None
        self._measured: Calibration | None = None
        self._latest: tuple[EngineLoop, Plan | None, int] | None = None

    def generate(self, pending: PendingRequests, policy: str) -> Iterator[SequenceOutput]:
        """Yield the outputs of `pending` as they finish."""
        started_s = time.perf_counter()
        executor, loop = self._opened = self._opened or self._open(pending)
        loaded_s = time.perf_counter()
        tree = None if self._window else pending.prefix_tree()
        calibrate_s = self._calibrate(executor, pending, tree)
        plan = None if tree is None else make_plan(tree, pending.table(), self._cost())
        planned_s = time.perf_counter()
        self.times = EngineTimes(loaded_s - started_s, planned_s - loaded_s - calibrate_s, calibrate_s=calibrate_s)
        outputs: Iterator[SequenceOutput]
        if plan is None:
            assert self._window is not None
            windows = windows_of(pending, self._window)
            outputs = run_windowed(loop, pending, windows, self._cost(), policy, self.front)
        else:
            outputs = run_planned(loop, pending, plan, policy, self.front)
        self._latest = (loop, plan, len(pending))
        try:
            yield from outputs
        finally:
            self.times = self.times._replace(run_s=time.perf_counter() - planned_s)
            loop.stats.resources = self._resources(executor)
            loop.stats.calibration = self._calibration_effort()
            self.stats = loop.stats
            self._tell_observer(policy, executor, loop.stats, plan)

    def answer_front(self) -> None:
        """Answer the requests of the front while nothing is planned."""
        assert self.front is not None, "there is no front"
        _, loop = self._opened = self._opened or self._open()
        for _ in self.front.run(loop, (), NothingPlanned()):
            raise AssertionError("nothing is planned")

    def plan(self, pending: PendingRequests) -> Plan:
        """The order of `pending` on this machine."""
        return plan_pending(pending, pending.table(), self._cost())

    def status(self) -> EngineStatus | None:
        """What the loop does now."""
        if self._latest is None:
            return None
        loop, plan, num_pending = self._latest
        stats = loop.stats
        num_tokens = stats.num_prefill_tokens + stats.num_decode_tokens
        if plan is None:  # what is not planned yet will be like what has finished
            expected = num_tokens * num_pending / max(1, stats.num_finished + stats.num_errors)
        else:
            expected = float(plan.expected_output_tokens.sum()) + plan.tree.num_unique_tokens
        return EngineStatus(
            num_running=loop.batcher.table.num_running,
            num_expected_tokens=expected,
            num_tokens=num_tokens,
            kv_use=1 - loop.batcher.free_tokens / loop.batcher.capacity_tokens,
            prefix_hit_rate=stats.prefix_hit_rate,
        )

    def close(self) -> None:
        """Give the weights and the KV memory back."""
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def _open(self, pending: PendingRequests | None = None) -> tuple[NativeExecutor, EngineLoop]:
        """What `pending` keeps of its prompts shares the KV memory with KV; what later requests keep comes on top."""
        model, config = self._model, resolve_limits(self._config, self._model.spec)
        kept = 0
        if pending is not None:
            pooling = model.pooling if pending.embeds_any() else None
            num_logprobs = pending.most_prompt_logprobs()
            kept = kept_bytes_per_block(model.spec.hidden_size, BLOCK_SIZE, num_logprobs, pooling)
        executor = open_executor(model, config, isa=self._isa, trace=self._trace, kept_bytes_per_block=kept)
        return executor, open_loop(self._model, config, executor)

    def _calibrate(self, executor: NativeExecutor, pending: PendingRequests, tree: PrefixTree | None) -> float:
        """Measure the machine if this is its first long run. Returns the seconds that took."""
        if self._measured is not None:
            return 0.0
        config, spec = resolve_limits(self._config, self._model.spec), self._model.spec

        def expected_s() -> float:
            part = pending if tree is not None else PendingRequests(pending.store, pending.numbers[: self._window])
            shared = tree or part.prefix_tree()
            cost = built_in_cost(spec, config.num_threads, config.dtype, config.kv_dtype)
            num_shared_tokens = shared.num_prompt_tokens - shared.num_unique_tokens
            return expected_work_s(cost, part.table(), num_shared_tokens) * len(pending) / len(part)

        started_s = time.perf_counter()
        measured = calibrate_executor(executor, config, expected_s, self._notify)
        self._measured = measured
        return time.perf_counter() - started_s if measured is not None else 0.0

    def _calibration_effort(self) -> str | None:
        config = self._config
        num_threads = resolve_limits(config, self._model.spec).num_threads
        found = self._measured or matching_calibration(
            cache_dir(), num_threads, lambda _: None, config.dtype, config.kv_dtype
        )
        return None if found is None else found.effort

    def _cost(self) -> CostModel:
        config = resolve_limits(self._config, self._model.spec)
        return cost_of(
            self._model.spec,
            config.num_threads,
            self._notify,
            config.dtype,
            config.kv_dtype,
            self._measured,
            config.overlap,
        )

    def _resources(self, executor: NativeExecutor) -> Resources:
        """Memory so far, and how long the first step was in coming."""
        memory = executor.memory
        startup_s, age_s = None, process_age_s()
        if len(self._trace) and age_s is not None:
            startup_s = age_s - (time.perf_counter() - self._trace.first_begin_s)
        return Resources(memory.weight_bytes, memory.kv_bytes, memory.workspace_bytes, peak_rss_bytes(), startup_s)

    def _tell_observer(self, policy: str, executor: NativeExecutor, stats: RunStats, plan: Plan | None) -> None:
        if self._observer is None:
            return
        self.notes += self._observer.run_ended(
            MeasuredRun(
                source=self._observer.source,
                model=self._model.spec.name,
                policy=policy,
                machine=machine_name(),
                num_threads=executor.num_threads,
                isa=executor.isa,
                peaks=self._measured.peaks()
                if self._measured
                else peaks_of(executor.num_threads, executor.dtype, executor.kv_dtype),
                stats=stats,
                counters=executor.counters(),
                trace=self._trace,
                op_names=op_names(),
                optimal_sharing=None if plan is None else plan.optimal_sharing,
            )
        )


def windows_of(pending: PendingRequests, size: int) -> Iterator[Window]:
    """The requests in the order of the file, `size` at a time, read when they are asked for."""
    for begin in range(0, len(pending), size):
        part = PendingRequests(pending.store, pending.numbers[begin : begin + size])
        yield Window(part.flat_prompts(), part.table())

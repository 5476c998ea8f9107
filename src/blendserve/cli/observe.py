"""What a run on the native engine tells of itself beyond its answers: `--trace`, `--report`, and memory used."""

from __future__ import annotations

import time
from pathlib import Path

from blendserve.costs.stored_calibration import machine_name
from blendserve.costs.this_machine import peaks_of
from blendserve.engine.stats import Resources, RunStats
from blendserve.errors import ConfigError
from blendserve.executors.native import NativeExecutor, op_names
from blendserve.executors.trace import MAX_SPANS, StepTrace
from blendserve.host import peak_rss_bytes, process_age_s
from blendserve.planner.plan import Plan
from blendserve.report.measured import MeasuredRun
from blendserve.report.run_page import write_page
from blendserve.report.trace_file import write_trace


class RunObserver:
    """Watches one run through `steps`, and writes what was asked for when it ends, interrupted or not.

    Raises: ConfigError when there is no directory to write to.
    """

    def __init__(self, source: str, trace_path: Path | None, report_path: Path | None) -> None:
        self._source = source
        self._trace_path = trace_path
        self._report_path = report_path
        for option, path in (("--trace", trace_path), ("--report", report_path)):
            if path is not None and not path.parent.is_dir():
                raise ConfigError(f"{option} {path}: there is no directory {path.parent}; make it first")
        self.steps = StepTrace(MAX_SPANS if trace_path or report_path else 0)

    def resources(self, executor: NativeExecutor) -> Resources:
        """Memory so far, and how long the first step was in coming."""
        memory = executor.memory
        startup_s, age_s = None, process_age_s()
        if len(self.steps) and age_s is not None:
            startup_s = age_s - (time.perf_counter() - self.steps.first_begin_s)
        return Resources(memory.weight_bytes, memory.kv_bytes, memory.workspace_bytes, peak_rss_bytes(), startup_s)

    def write(
        self, model: str, policy: str, executor: NativeExecutor, stats: RunStats, plan: Plan | None
    ) -> tuple[str, ...]:
        """Write the files. Returns what the user should know: the answers are worth more than a file that failed."""
        if self._trace_path is None and self._report_path is None:
            return ()
        run = MeasuredRun(
            source=self._source,
            model=model,
            policy=policy,
            machine=machine_name(),
            num_threads=executor.num_threads,
            isa=executor.isa,
            peaks=peaks_of(executor.num_threads, executor.dtype),
            stats=stats,
            counters=executor.counters(),
            trace=self.steps,
            op_names=op_names(),
            optimal_sharing=None if plan is None else plan.optimal_sharing,
        )
        try:
            if self._trace_path is not None:
                write_trace(self._trace_path, run)
            if self._report_path is not None:
                write_page(self._report_path, run)
        except ConfigError as error:
            return (str(error),)
        return ()

"""What a finished run tells its user: as lines of text, or as one JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from blendserve.engine.stats import Resources, RunStats
from blendserve.engines.base import EngineTimes
from blendserve.job.job import JobReport
from blendserve.report.format import format_bytes, printable_line
from blendserve.report.progress import format_seconds


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A job's report beside the clock and the engine's counters. Units: seconds, tokens; tokens are of this run only.

    `makespan_s` is from the start of the command to the last file written; `times` are the engine's. `stats` is None
    where nothing was left to run.
    """

    report: JobReport
    policy: str
    makespan_s: float
    times: EngineTimes
    stats: RunStats | None

    @property
    def tokens_per_s(self) -> float:
        """Input and output tokens served per second of the run, prefix hits included."""
        return (
            (self.report.num_prompt_tokens + self.report.num_output_tokens) / self.times.run_s
            if self.times.run_s
            else 0.0
        )

    def to_json(self) -> dict[str, Any]:
        """Every figure, units in the names."""
        report = asdict(self.report)
        report["errors_by_code"] = dict(self.report.errors_by_code)
        own: dict[str, Any] = {
            "policy": self.policy,
            "makespan_s": self.makespan_s,
            **self.times._asdict(),
            "tokens_per_s": self.tokens_per_s,
        }
        return report | own | (_stats_fields(self.stats) if self.stats is not None else {})

    def to_text(self) -> str:
        """A few lines for a person."""
        report = self.report
        if report.was_complete:
            return f"already complete: {report.output_path} ({report.num_succeeded} answers); --fresh runs it again"
        calibrate = f"calibrate {self.times.calibrate_s:.1f}, " if self.times.calibrate_s else ""
        lines = [
            f"{report.num_succeeded} answers in {report.output_path}"
            + _resumed(report.num_resumed)
            + _reused(report.num_reused),
            f"{report.num_failed} errors" + _by_code(report.errors_by_code, report.errors_path),
            f"makespan {format_seconds(self.makespan_s)} ({self.makespan_s:.1f} s: load {self.times.load_s:.1f}, "
            f"{calibrate}plan {self.times.plan_s:.1f}, run {self.times.run_s:.1f}), policy {self.policy}",
            f"tokens in {report.num_prompt_tokens} (cached {report.num_cached_tokens}), out "
            f"{report.num_output_tokens}, {self.tokens_per_s:.0f} tok/s",
        ]
        if self.stats is not None:
            lines.append(
                f"steps {self.stats.num_steps}, scheduling {self.stats.scheduling_share:.1%} of step time (mean "
                f"{self.stats.mean_scheduling_s * 1e3:.2f} ms, P99 {self.stats.p99_scheduling_s * 1e3:.2f} ms), "
                f"{self.stats.num_preemptions} preemptions, KV peak {_kv_peak(self.stats):.0%}"
            )
            if self.stats.resources is not None:
                lines.append(_resources_line(self.stats.resources))
        return "\n".join([*lines, *map(printable_line, report.notes)])


def _resources_line(resources: Resources) -> str:
    first = "" if resources.startup_s is None else f"; first step {resources.startup_s:.1f} s after start"
    return (
        f"memory {format_bytes(resources.peak_rss_bytes)} resident at the peak: weights "
        f"{format_bytes(resources.weight_bytes)}, KV as far as used of {format_bytes(resources.kv_bytes)}, buffers "
        f"{format_bytes(resources.workspace_bytes)}{first}"
    )


def _stats_fields(stats: RunStats) -> dict[str, Any]:
    resources = {} if stats.resources is None else asdict(stats.resources)
    return resources | {
        "num_steps": stats.num_steps,
        "executor_s": stats.executor_s,
        "scheduling_s": stats.scheduling_s,
        "scheduling_share": stats.scheduling_share,
        "scheduling_mean_s": stats.mean_scheduling_s,
        "scheduling_p99_s": stats.p99_scheduling_s,
        "balance": stats.balance,
        "num_preemptions": stats.num_preemptions,
        "max_running": stats.max_running,
        "kv_peak": _kv_peak(stats),
        "prefix_hit_rate": stats.prefix_hit_rate,
        "calibration": stats.calibration,
    }


def _kv_peak(stats: RunStats) -> float:
    return stats.max_kv_tokens / max(1, stats.capacity_tokens)


def _resumed(count: int) -> str:
    return f", {count} requests of them from an earlier run" if count else ""


def _reused(count: int) -> str:
    return f", {count} of them kept, for rows that did not change" if count else ""


def _by_code(errors_by_code: Mapping[str, int], errors_path: str | None) -> str:
    if not errors_by_code:
        return ""
    listed = ", ".join(f"{printable_line(code)} {count}" for code, count in sorted(errors_by_code.items()))
    return f" in {errors_path}: {listed}"

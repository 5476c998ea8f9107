"""What a finished run tells its user: as lines of text, or as one JSON object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blendserve.engine.stats import Resources, RunStats
from blendserve.engines.base import EngineTimes
from blendserve.job.job import JobReport
from blendserve.report.format import format_bytes, plural, printable_line
from blendserve.report.progress import format_seconds


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The reports of a run beside the clock and the engine's counters. Units: seconds, tokens; tokens are of this run
    only.

    `makespan_s` is from the start of the command to the last file written; `times` are the engine's. `stats` is None
    where nothing was left to run.
    """

    reports: Sequence[JobReport]
    policy: str
    makespan_s: float
    times: EngineTimes
    stats: RunStats | None

    @property
    def exit_code(self) -> int:
        """What the command returns: 0 when every line of every file was answered, else 3."""
        return max(report.exit_code for report in self.reports)

    @property
    def num_tokens(self) -> int:
        """Input and output tokens of this run, prefix hits included."""
        return sum(report.num_prompt_tokens + report.num_output_tokens for report in self.reports)

    @property
    def tokens_per_s(self) -> float:
        """Input and output tokens served per second of the run, prefix hits included."""
        return self.num_tokens / self.times.run_s if self.times.run_s else 0.0

    def to_json(self) -> dict[str, Any]:
        """Every figure, units in the names. Several files: their sums, and `files` with the report of each."""
        own: dict[str, Any] = {
            "exit_code": self.exit_code,
            "num_failed": sum(report.num_failed for report in self.reports),
            "policy": self.policy,
            "makespan_s": self.makespan_s,
            **self.times._asdict(),
            "tokens_per_s": self.tokens_per_s,
        }
        files = [asdict(report) for report in self.reports]
        reported = files[0] if len(files) == 1 else {**_sums(self.reports), "files": files}
        return reported | own | (_stats_fields(self.stats) if self.stats is not None else {})

    def to_text(self) -> str:
        """A few lines for a person."""
        lines = [line for report in self.reports for line in _report_lines(report)]
        if not all(report.was_complete for report in self.reports):
            lines += self._run_lines()
        notes = dict.fromkeys(note for report in self.reports for note in report.notes)
        return "\n".join([*lines, *map(printable_line, notes)])

    def _run_lines(self) -> list[str]:
        calibrate = f"calibrate {self.times.calibrate_s:.1f}, " if self.times.calibrate_s else ""
        sums = _sums(self.reports)
        lines = [
            f"makespan {format_seconds(self.makespan_s)} ({self.makespan_s:.1f} s: load {self.times.load_s:.1f}, "
            f"{calibrate}plan {self.times.plan_s:.1f}, run {self.times.run_s:.1f}), policy {self.policy}",
            f"tokens in {sums['num_prompt_tokens']} (cached {sums['num_cached_tokens']}), out "
            f"{sums['num_output_tokens']}, {self.tokens_per_s:.0f} tok/s",
        ]
        if self.stats is not None:
            lines.append(
                f"steps {self.stats.num_steps}, scheduling {self.stats.scheduling_share:.1%} of step time (mean "
                f"{self.stats.mean_scheduling_s * 1e3:.2f} ms, P99 {self.stats.p99_scheduling_s * 1e3:.2f} ms), "
                f"{plural(self.stats.num_preemptions, 'preemption')}, KV peak {_kv_peak(self.stats):.0%}"
            )
            if self.stats.num_constrained:
                lines.append(_grammars_line(self.stats))
            if self.stats.resources is not None:
                lines.append(_resources_line(self.stats.resources))
        return lines


def _report_lines(report: JobReport) -> list[str]:
    """How one job ended."""
    answers = plural(report.num_succeeded, "answer")
    if not report.num_succeeded and report.num_failed:
        answers = "no line was answered: 0 answers"
    errors = plural(report.num_failed, "error") + _by_code(report.errors_by_code, report.errors_path)
    if report.was_complete:
        failed = f", {errors}" if report.num_failed else ""
        return [f"already complete: {report.output_path} ({answers}{failed}); --fresh runs it again"]
    kept = _resumed(report.num_resumed) + _reused(report.num_reused)
    return [f"{answers} in {report.output_path}" + kept, errors]


def _sums(reports: Sequence[JobReport]) -> dict[str, Any]:
    """What reports count, added up."""
    counts = (
        "num_lines",
        "num_succeeded",
        "num_resumed",
        "num_reused",
        "num_prompt_tokens",
        "num_cached_tokens",
        "num_output_tokens",
    )
    errors: Counter[str] = Counter()
    for report in reports:
        errors.update(report.errors_by_code)
    sums: dict[str, Any] = {name: sum(getattr(report, name) for report in reports) for name in counts}
    return {**sums, "errors_by_code": dict(errors), "was_complete": all(report.was_complete for report in reports)}


def _grammars_line(stats: RunStats) -> str:
    return (
        f"structured answers {stats.num_constrained}: {plural(stats.num_grammars, 'grammar')} compiled in "
        f"{stats.grammar_compile_s:.2f} s, masks filled for {stats.grammar_mask_s:.2f} s; sampling waited "
        f"{stats.grammar_wait_s:.2f} s for grammars"
    )


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
        "num_prefill_tokens": stats.num_prefill_tokens,
        "max_running": stats.max_running,
        "kv_peak": _kv_peak(stats),
        "prefix_hit_rate": stats.prefix_hit_rate,
        "num_constrained": stats.num_constrained,
        "num_grammars": stats.num_grammars,
        "grammar_compile_s": stats.grammar_compile_s,
        "grammar_mask_s": stats.grammar_mask_s,
        "grammar_wait_s": stats.grammar_wait_s,
        "calibration": stats.calibration,
    }


def _kv_peak(stats: RunStats) -> float:
    return stats.max_kv_tokens / max(1, stats.capacity_tokens)


def _resumed(count: int) -> str:
    return f", {plural(count, 'request')} of them from an earlier run" if count else ""


def _reused(count: int) -> str:
    return f", {count} of them kept, for rows that did not change" if count else ""


def _by_code(errors_by_code: Mapping[str, int], errors_path: str | None) -> str:
    if not errors_by_code:
        return ""
    listed = ", ".join(f"{printable_line(code)} {count}" for code, count in sorted(errors_by_code.items()))
    return f" in {errors_path}: {listed}"

"""A plan and its forecasts as lines of text, and as one JSON object."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blendserve.report.format import format_count, format_duration, format_figure, format_number, format_share, plural
from blendserve.report.plan_summary import EndSummary, PlanSummary
from blendserve.simulator.forecast import Forecasts

LENGTHS_NOTE = (
    "Output lengths that no request fixes are assumed: half are under about 100 tokens, a few run to max_tokens; "
    "--output-tokens assumes another length."
)


@dataclass(frozen=True, slots=True)
class PlanReport:
    """All that `blendserve plan` has to say. `notes` are remarks on what was assumed or left out."""

    source: str
    num_lines: int
    num_refused_by_code: Mapping[str, int]
    summary: PlanSummary
    forecasts: Forecasts
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Every figure, units in the names; what is infinite is null."""
        forecasts = self.forecasts
        value = {
            "source": self.source,
            "num_lines": self.num_lines,
            "num_refused_by_code": dict(self.num_refused_by_code),
            "hardware": forecasts.machine.hardware.name,
            "model": forecasts.machine.model.name,
            "plan": asdict(self.summary),
            "simulated": {
                "num_requests": forecasts.num_simulated,
                "num_oversized": forecasts.num_oversized,
                "num_cut": forecasts.num_cut,
                "optimum_s": forecasts.bounds.optimum_s,
                "lower_bound_s": forecasts.bounds.lower_bound_s,
                "policies": [
                    {
                        "policy": run.result.policy,
                        "time_s": run.time_s,
                        "tokens_per_s": run.tokens_per_s,
                        "share_of_bound": run.result.share_of_bound,
                        "sharing": run.result.sharing,
                        "sharing_kept": run.result.sharing_kept,
                        "num_preemptions": run.num_preemptions,
                    }
                    for run in forecasts.runs
                ],
            },
            "notes": list(self.notes),
        }
        cleaned: dict[str, Any] = finite(value)
        return cleaned

    def to_text(self) -> str:
        """A page of text for a person."""
        summary = self.summary
        lines = [
            f"{self.source}: {describe_refused(self.num_lines, self.num_refused_by_code)}",
            f"  {plural(summary.num_requests, 'request')}, {plural(summary.num_distinct_prompts, 'distinct prompt')}, "
            f"{plural(summary.num_known_outputs, 'known output length')}",
            f"  prompts  {_lengths(summary.prompts)}; {format_count(summary.prompt_tokens)} tokens in all",
            f"  outputs  {_lengths(summary.outputs)}; {format_count(summary.expected_output_tokens)} expected in all",
            f"  sharing  {format_share(summary.optimal_sharing)} of prompt tokens at best, "
            f"{format_share(summary.planned_sharing)} as planned ({summary.num_split_leaves} prompts moved)",
            "",
            f"on {target_name(self.forecasts)}:",
            f"  density  {describe_density(summary)}",
            f"  compute end  {_end(summary.compute_end)}",
            f"  memory end   {_end(summary.memory_end)}",
        ]
        if summary.prefixes:
            lines += ["", "shared prefixes that save most:", *text_table(PREFIX_HEADERS, prefix_rows(summary), (3, 4))]
        lines += ["", f"{describe_part(self.forecasts)}:", *text_table(POLICY_HEADERS, policy_rows(self.forecasts))]
        return "\n".join([*lines, *self.notes])


POLICY_HEADERS = ("policy", "time", "tokens/s", "share of bound", "sharing", "of possible", "preemptions")
PREFIX_HEADERS = ("saves tokens", "prefix", "requests", "kind", "begins with")


def policy_rows(forecasts: Forecasts) -> list[tuple[str, ...]]:
    """One row per simulated run, fastest first."""
    return [
        (
            run.name,
            format_duration(run.time_s),
            format_figure(run.tokens_per_s),
            format_share(run.result.share_of_bound),
            format_share(run.result.sharing),
            format_share(run.result.sharing_kept),
            format_count(run.num_preemptions),
        )
        for run in sorted(forecasts.runs, key=lambda run: run.time_s)
    ]


def prefix_rows(summary: PlanSummary) -> list[tuple[str, ...]]:
    """One row per listed prefix."""
    return [
        (
            format_count(prefix.num_saved_tokens),
            format_count(prefix.num_prefix_tokens),
            format_count(prefix.num_requests),
            "whole prompt" if prefix.is_whole_prompt else "prefix",
            prefix.text,
        )
        for prefix in summary.prefixes
    ]


def describe_refused(num_lines: int, num_refused_by_code: Mapping[str, int]) -> str:
    """How many lines a run would refuse, and why."""
    num_refused = sum(num_refused_by_code.values())
    if not num_refused:
        return f"{plural(num_lines, 'line')}, all valid"
    codes = ", ".join(f"{code} {count}" for code, count in num_refused_by_code.items())
    return f"{plural(num_lines, 'line')}, {format_count(num_refused)} refused ({codes})"


def describe_density(summary: PlanSummary) -> str:
    """Which of the two resources the job needs more of."""
    kind = "compute-intensive" if summary.root_density > 1 else "memory-intensive"
    return (
        f"{format_number(summary.root_density)}, {kind}: {format_duration(summary.compute_s)} of compute, "
        f"{format_duration(summary.memory_s)} of memory traffic"
    )


def target_name(forecasts: Forecasts) -> str:
    """Model and hardware."""
    machine = forecasts.machine
    count = f"{machine.tensor_parallel} x " if machine.tensor_parallel > 1 else ""
    return f"{count}{machine.hardware.name} with {machine.model.name}"


def describe_part(forecasts: Forecasts) -> str:
    """What was simulated, said so that nobody takes it for a measurement."""
    if forecasts.is_whole:
        return "simulated, not measured"
    return (
        f"simulated, not measured: {format_count(forecasts.num_simulated)} of "
        f"{format_count(forecasts.num_requests)} requests on a machine made smaller to match, scaled to all"
    )


def part_notes(forecasts: Forecasts) -> list[str]:
    """Remarks on requests that the machine cannot hold, or that decide the time alone."""
    notes = []
    capacity = f"the {format_count(forecasts.machine.capacity_tokens)} tokens of KV memory"
    if forecasts.num_oversized:
        notes.append(f"{plural(forecasts.num_oversized, 'request')} left out: the prompt does not fit {capacity}.")
    if forecasts.bounds.longest_s >= forecasts.bounds.lower_bound_s:
        notes.append(
            f"The longest request alone takes {format_duration(forecasts.bounds.longest_s)}: no order ends sooner, and "
            "orders of so small a job differ little."
        )
    if forecasts.num_cut:
        notes.append(f"{plural(forecasts.num_cut, 'output')} cut short to fit {capacity}.")
    return notes


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)) -> list[str]:
    """Aligned columns, two spaces in; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = []
    for row in (headers, *rows):
        cells = (
            cell.ljust(width) if column in text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def finite(value: Any) -> Any:
    """The same value for JSON, which has no infinity: null in its place."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _lengths(lengths: Any) -> str:
    return (
        f"{format_count(lengths.least)} to {format_count(lengths.greatest)} tokens, median "
        f"{format_count(lengths.median)}, 99% up to {format_count(lengths.p99)}"
    )


def _end(end: EndSummary) -> str:
    return (
        f"density {format_number(end.density)}: {plural(end.num_requests, 'request')} with a tenth of the work, "
        f"{end.mean_prompt_tokens:,.0f} prompt and {end.mean_output_tokens:,.0f} output tokens on average"
    )

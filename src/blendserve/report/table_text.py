"""A plan and a sample of a job on a table, as lines of text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blendserve.report.format import format_count, format_duration, format_share, plural, printable_line
from blendserve.tables.trial import FieldAdvice, Sample, SampledRow, TablePlan

_SHOWN_CHARACTERS = 60


def plan_text(name: str, found: TablePlan, time_s: float | None, policy: str) -> str:
    """What `blendserve map --dry-run` prints. `time_s` is None where nothing is known of the machine."""
    lines = [f"{name}: {plural(found.num_rows, 'row')}{_refused(found.refused_by_code)}"]
    if found.plan is not None:
        plan = found.plan
        num_outputs = round(float(plan.expected_output_tokens.sum()))
        time = "not known: `blendserve calibrate` or --sample measures it"
        if time_s is not None:
            time = f"{format_duration(time_s)} simulated on this machine, policy {policy}"
        lines += [
            f"  prompts  {format_count(plan.tree.num_prompt_tokens)} tokens, {format_share(plan.planned_sharing)} of "
            f"them shared as planned ({format_share(plan.optimal_sharing)} at best)",
            f"  outputs  {format_count(num_outputs)} tokens if their lengths are as usual: --sample measures them",
            f"  time     {time}",
        ]
    return "\n".join([*lines, *([f"  columns  {_advice(found.advice)}"] if found.advice is not None else [])])


def plan_json(name: str, found: TablePlan, time_s: float | None) -> dict[str, Any]:
    """The same figures."""
    plan, advice = found.plan, found.advice
    return {
        "source": name,
        "num_rows": found.num_rows,
        "num_refused_by_code": dict(found.refused_by_code),
        "num_requests": plan.num_requests if plan is not None else 0,
        "prompt_tokens": plan.tree.num_prompt_tokens if plan is not None else 0,
        "planned_sharing": plan.planned_sharing if plan is not None else 0.0,
        "optimal_sharing": plan.optimal_sharing if plan is not None else 0.0,
        "expected_output_tokens": float(plan.expected_output_tokens.sum()) if plan is not None else 0.0,
        "time_s": time_s,
        "better_order": None
        if advice is None
        else {
            "columns": list(advice.order),
            "per_row": advice.per_row,
            "shared": advice.shared,
            "shared_before": advice.shared_before,
        },
    }


def sample_text(sample: Sample) -> str:
    """The rows of a sample, and what follows for all."""
    share = sample.shared_tokens / max(1, sample.prompt_tokens)
    return "\n".join(
        [
            *(line for row in sample.rows for line in _row_lines(row)),
            "",
            f"{plural(len(sample.rows), 'row')} answered in {format_duration(sample.sample_s)}; for all "
            f"{format_count(sample.num_left)} that are left, about:",
            f"  prompts  {format_count(sample.prompt_tokens)} tokens, {format_share(share)} of them shared as planned",
            f"  outputs  {format_count(round(sample.output_tokens))} tokens",
            f"  time     {format_duration(sample.time_s)}{_how_sure(sample)}",
            "The same command without --sample answers the others; these rows are kept.",
        ]
    )


def _how_sure(sample: Sample) -> str:
    if sample.is_simulated:
        return ", simulated on this machine and corrected by the sample"
    return " at most, and mostly much less: more rows run better side by side"


def sample_json(sample: Sample) -> dict[str, Any]:
    """The same figures, with the rows."""
    rows = [
        {"row": row.number, "name": row.name, **row.answer._asdict(), "value": _plain(row.answer.value)}
        for row in sample.rows
    ]
    return {
        "rows": rows,
        "num_left": sample.num_left,
        "prompt_tokens": sample.prompt_tokens,
        "shared_tokens": sample.shared_tokens,
        "output_tokens": sample.output_tokens,
        "time_s": sample.time_s,
        "sample_s": sample.sample_s,
        "is_simulated": sample.is_simulated,
    }


def _row_lines(row: SampledRow) -> list[str]:
    asked = ", ".join(f"{name}: {_short(value)}" for name, value in row.columns.items())
    answer = row.answer
    came = f"error: {answer.error}" if answer.error is not None else _short(answer.value)
    return [printable_line(f"{row.name}  {asked}"), printable_line(f"  -> {came}")]


def _short(value: Any) -> str:
    text = " ".join(str(_plain(value)).split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _plain(value: Any) -> Any:
    """A vector as its numbers, everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _refused(refused_by_code: Mapping[str, int]) -> str:
    if not refused_by_code:
        return ""
    listed = ", ".join(f"{code} {count}" for code, count in sorted(refused_by_code.items()))
    return f", {sum(refused_by_code.values())} of them cannot be asked ({listed})"


def _advice(advice: FieldAdvice) -> str:
    gained = f"{format_share(advice.shared)} of their text be shared, and not {format_share(advice.shared_before)}"
    if advice.per_row:
        return f"--reorder-fields would let {gained}"
    return f"a prompt that names them in the order {_listed(advice.order)} would let {gained}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)

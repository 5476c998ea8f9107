"""Why the figures are what they are: where time goes, what more replicas cost, and which assumptions matter."""

from __future__ import annotations

from pathlib import Path

import paper_reference as paper
from paper_run import Outcome
from paper_tables import BASE, OURS, by_system, grouped, table

from blendserve.simulator.losses import PHASES


def losses_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """What lies between a run of blend and T_lb."""
    rows = []
    for label, group in grouped(outcomes, lambda outcome: outcome.cell.label).items():
        by_knowledge = {outcome.cell.knowledge: outcome for outcome in group}
        run, exact = by_knowledge["1% samples"], by_knowledge["exact"]
        parts = [run.losses_s["again"], *(run.losses_s[f"{phase}_{what}"] for phase in PHASES for what in WHATS)]
        lost_s = run.time_s - run.lower_bound_s
        unknown_s = run.time_s - exact.time_s
        rows.append((label, *(_percent(part / run.time_s) for part in (*parts, lost_s, unknown_s))))
    headers = ["trace", "computed again", *(f"{phase}: {what}" for phase in PHASES for what in WHATS)]
    return [
        "## Where the time beyond T_lb goes: % of the time of blend",
        *table((*headers, "sum = 1 - T_lb / T", "of it because lengths are not known"), rows),
        "Begin: before the KV memory is 90% full. End: after it was for the last time. Steps: constants of more steps "
        "than a full memory needs. Mix: steps with too much of one resource for the other. The last column is the time "
        "over that of a run that knows all lengths; it is a part of the others and not one more.",
        "",
    ]


WHATS = ("steps", "mix")


def _percent(share: float) -> str:
    return f"{round(100 * share, 2) + 0.0:.2f}"  # no -0.00


def replicas_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """Data parallelism on one job."""
    rows: list[tuple[object, ...]] = []
    for label, group in grouped(outcomes, lambda outcome: outcome.cell.label).items():
        by_count = {outcome.cell.num_replicas: outcome for outcome in group}
        one = by_count.get(1)
        for count in sorted(by_count.keys() - {1}) if one is not None else ():
            run = by_count[count]
            assert one is not None
            rows.append(
                (
                    label,
                    count,
                    one.time_s / run.time_s,
                    paper.TABLE_3_SPEEDUP.get((str(label), count), ""),
                    one.time_s / run.lower_bound_s,
                    run.share_of_bound,
                    min(run.replica_s) / max(run.replica_s),
                    run.sharing_kept,
                    run.longest_output,
                )
            )
    if not rows:
        return []
    headers = ("speed, DP=1 is 1", "paper", "most that the bound allows", "T_lb / T", "first to end / last")
    return [
        "## Table 3: data parallelism, the same job on more replicas (blend)",
        *table(("trace", "DP", *headers, "sharing kept", "longest answer, tokens"), rows),
        "The bound counts the steps of the longest answers: no replica that holds one can take fewer.",
        "",
    ]


def sensitivity_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """One assumption changed at a time."""
    rows = []
    for variant, group in grouped(outcomes, lambda outcome: outcome.cell.variant).items():
        systems = by_system(group)
        base, ours, random = systems[BASE], systems[OURS], systems["NanoFlow-Balance"]
        ratios = (base.time_s / ours.time_s, base.time_s / random.time_s)
        kept = (base.sharing_kept, random.sharing_kept)
        rows.append((variant or "as everywhere else", *ratios, *kept, base.share_of_optimum, ours.share_of_bound))
    headers = ("blend over DFS", "Balance over DFS", "sharing kept by DFS", "by Balance", "DFS, T_o / T")
    return [
        f"## One assumption changed at a time, {outcomes[0].cell.label}",
        *table(("assumption", *headers, "blend, T_lb / T"), rows),
        "Paper: Balance keeps less than 0.30 of the sharing. With a tenth of the KV memory, videos that do not fit are "
        "left out of the job.",
        "",
    ]

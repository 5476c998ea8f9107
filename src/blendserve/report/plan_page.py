"""The page of `blendserve plan --html`: the order, the prefixes, the lengths, and what policies would make of them."""

from __future__ import annotations

import numpy as np

from blendserve.planner.plan import Plan
from blendserve.planner.sorting import FlatPrompts
from blendserve.report.format import format_count, format_duration, format_number, format_share, plural
from blendserve.report.html import Html, element, figure, grid, page, section, table, tiles
from blendserve.report.icicle import icicle
from blendserve.report.plan_text import (
    POLICY_HEADERS,
    PREFIX_HEADERS,
    PlanReport,
    describe_part,
    describe_refused,
    policy_rows,
    prefix_rows,
    target_name,
)
from blendserve.report.series import Floats, log_histogram, means_along, spread_along
from blendserve.report.svg import Axis, Chart
from blendserve.report.timelines import busy_charts
from blendserve.simulator.plan_summary import Decode, EndSummary

_NUM_DENSITY_SLICES = 400
_NUM_FILE_SLICES = 40
_DENSITY_LIMITS = (1e-3, 1e4)


def plan_page(report: PlanReport, plan: Plan, prompts: FlatPrompts, decode: Decode) -> str:
    """The whole page."""
    forecasts = report.forecasts
    prompt_tokens = plan.table.num_prompt_tokens.astype(np.float64)
    sections = [
        _tiles(report),
        section(
            "What each order would take",
            f"{describe_part(forecasts).capitalize()}, on {target_name(forecasts)}. The share of bound compares with a "
            "time that no schedule can beat.",
            table(POLICY_HEADERS, policy_rows(forecasts)),
        ),
        section(
            "Density along the planned order",
            "Compute over memory time of requests, from the compute end (left) to the memory end (right). The plan "
            "serves both ends at once; in file order either kind comes as it comes.",
            figure("Density of requests: median line; shaded towards 1, where compute and memory balance",
                   density_chart(plan).render()),
            table(("end", "requests", "density", "prompt tokens", "output tokens"), _end_rows(report)),
        ),
        section(
            "How busy the two resources are",
            "Both curves high and steady is the goal: an order that serves one kind of request at a time leaves the "
            "other resource idle. One time axis for all.",
            grid(*busy_charts(forecasts.runs)),
        ),
        section(
            "Where prefixes are shared",
            "Every rectangle is a prefix that the requests under it share, as wide as their prompt tokens; blue is "
            "compute-intensive, orange memory-intensive, stronger further from balance. Hover for details.",
            figure("Prefix tree, widest levels", icicle(plan, prompts, decode)),
            table(PREFIX_HEADERS[::-1], [row[::-1] for row in prefix_rows(report.summary)], num_text_columns=2),
        ),
        section(
            "Lengths",
            "Bins of equal ratio. Outputs are the planner's estimates before anything has run.",
            grid(
                figure("Prompt tokens per request", _histogram(prompt_tokens, "compute")),
                figure("Expected output tokens per request", _histogram(plan.expected_output_tokens, "memory")),
            ),
        ),
        section("Notes", "", element("ul", *(element("li", note) for note in report.notes))),
    ]  # fmt: skip
    return page(f"Plan of {report.source}", describe_refused(report.num_lines, report.num_refused_by_code), sections)


def density_chart(plan: Plan) -> Chart:
    """Density of requests along the planned order, and in file order for comparison."""
    planned = _shown_density(plan.schedule.density[plan.schedule.order])
    in_file = _shown_density(plan.schedule.density)
    low = min(0.5, float(planned.min()))
    high = max(2.0, float(planned.max()))
    label = "requests in the planned order: compute end left, memory end right"
    chart = Chart(
        Axis(label, 0, plan.num_requests),
        Axis("density (log)", low / 2, high * 1.5, is_log=True),
        label="density along the planned order",
        size=(1280, 300),
    )
    spread = spread_along(planned, _NUM_DENSITY_SLICES)
    xs, ys = _steps(spread.edges, spread.median)
    chart.band(xs, np.where(ys >= 1, 1.0, np.nan), ys, "compute", "compute-intensive", opacity=0.4)
    chart.band(xs, ys, np.where(ys < 1, 1.0, np.nan), "memory", "memory-intensive", opacity=0.4)
    edges, means = means_along(np.log(in_file), _NUM_FILE_SLICES)
    chart.line((edges[:-1] + edges[1:]) / 2, np.exp(means), "third", "in file order (mean)")
    chart.rule(plan.root_density, f"whole job {format_number(plan.root_density)}")
    titles = [
        f"requests {begin:,.0f} to {end:,.0f}: density {format_number(median)} (middle 90%: {format_number(least)} to "
        f"{format_number(most)})"
        for begin, end, least, median, most in zip(
            spread.edges[:-1], spread.edges[1:], spread.low, spread.median, spread.high, strict=True
        )
    ]
    chart.hover(spread.edges, titles)
    return chart


def _shown_density(density: Floats) -> Floats:
    return np.clip(density, *_DENSITY_LIMITS)


def _steps(edges: Floats, values: Floats) -> tuple[Floats, Floats]:
    """The corners of a staircase: every value from its left edge to its right one."""
    return np.repeat(edges, 2)[1:-1], np.repeat(values, 2)


def _histogram(values: Floats, style: str) -> Html:
    edges, counts = log_histogram(values)
    across = Axis("tokens (log)", float(edges[0]), float(edges[-1]), is_log=True)
    chart = Chart(across, Axis("requests", 0, float(counts.max()) * 1.05), label="histogram")
    titles = [
        f"{begin:,.0f} to {end:,.0f} tokens: {plural(int(count), 'request')}"
        for begin, end, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    chart.bars(edges, counts.astype(np.float64), style, titles)
    return chart.render()


def _tiles(report: PlanReport) -> Html:
    summary, forecasts = report.summary, report.forecasts
    best = forecasts.best
    return tiles(
        [
            ("Requests", format_number(summary.num_requests), f"{format_count(summary.num_distinct_prompts)} distinct"),
            ("Prompt tokens", format_number(summary.prompt_tokens), f"median {format_count(summary.prompts.median)}"),
            (
                "Output tokens",
                format_number(summary.expected_output_tokens),
                f"expected; {format_count(summary.num_known_outputs)} lengths known",
            ),
            (
                "Prefix sharing",
                format_share(summary.optimal_sharing),
                f"at best; {format_share(summary.planned_sharing)} as planned",
            ),
            (
                "Density",
                format_number(summary.root_density),
                "compute-intensive" if summary.root_density > 1 else "memory-intensive",
            ),
            (
                "Fastest, simulated",
                format_duration(best.time_s),
                f"{best.name}, {format_share(best.result.share_of_bound)} of bound",
            ),
        ]
    )


def _end_rows(report: PlanReport) -> list[tuple[str, ...]]:
    def row(name: str, end: EndSummary) -> tuple[str, ...]:
        return (
            name,
            format_count(end.num_requests),
            format_number(end.density),
            f"{end.mean_prompt_tokens:,.0f}",
            f"{end.mean_output_tokens:,.0f}",
        )

    summary = report.summary
    return [
        row("compute end: the first tenth of the work", summary.compute_end),
        row("memory end: the last tenth of the work", summary.memory_end),
    ]

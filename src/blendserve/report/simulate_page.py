"""The page of `blendserve simulate --html`: results, and what every simulated run did over time."""

from __future__ import annotations

from blendserve.report.format import format_duration, format_number, format_share, plural
from blendserve.report.html import Html, element, grid, page, section, table, tiles
from blendserve.report.plan_text import describe_part, target_name
from blendserve.report.simulate_text import SimulateReport
from blendserve.report.timelines import run_charts


def simulate_page(report: SimulateReport) -> str:
    """The whole page."""
    forecasts = report.forecasts
    sections = [
        _tiles(report),
        section(
            "Results",
            f"{describe_part(forecasts).capitalize()}. A sequential engine computes and reads memory one after the "
            "other; an overlapped one does both at once. The share of bound compares with a time that no schedule "
            "beats.",
            table(report.headers, report.rows, num_text_columns=2),
        ),
        section(
            "What every run did over time",
            "Left: an order that blends the two kinds of request keeps compute and memory level to the end; where one "
            "runs far above the other, the lower resource idles. Middle: the closer to the dashed line, the better "
            "what runs together matches the whole job. Right: fuller is better; the slope at the end is the tail. All "
            "runs have the same axes; hover for figures.",
            grid(*run_charts(forecasts.runs, forecasts.root_density), is_narrow=True),
        ),
        section("Notes", "", element("ul", *(element("li", note) for note in report.notes))),
    ]
    subtitle = f"{plural(forecasts.num_replicas, 'replica')} of {target_name(forecasts)}"
    return page(f"Simulation of {report.source}", subtitle, sections)


def _tiles(report: SimulateReport) -> Html:
    forecasts = report.forecasts
    best = forecasts.best
    slowest = max(forecasts.runs, key=lambda run: run.time_s)
    gain = f"{slowest.time_s / best.time_s:.2f}x faster than {slowest.name}" if slowest is not best else best.name
    price = f", {best.price:,.2f} at the given rate" if report.has_price else ""
    return tiles(
        [
            ("Fastest", best.result.policy, f"{best.result.engine} engine"),
            ("Time", format_duration(best.time_s), gain),
            ("Throughput", f"{format_number(best.tokens_per_s)} tok/s", "input and output tokens"),
            (report.hours, format_number(best.gpu_hours), f"{plural(best.result.num_gpus, 'device')}{price}"),
            ("Share of bound", format_share(best.result.share_of_bound), "of what no schedule beats"),
            ("Prefix sharing", format_share(best.result.sharing), f"{format_share(forecasts.optimal_sharing)} at best"),
        ]
    )

"""Charts of simulated runs over time: the two resources, KV use, and the density of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from blendserve.report.forecast import Forecast
from blendserve.report.format import format_duration, format_number, format_share, time_unit
from blendserve.report.html import Html, figure
from blendserve.report.series import Floats, Timeline, slice_steps
from blendserve.report.svg import Axis, Chart

NUM_SLICES = 240
_NUM_HOVERS = 60
_DENSITY_RANGE = (0.01, 100.0)

ChartOf = Callable[[Forecast, Timeline, Axis], Chart]


def timeline_of(run: Forecast, num_slices: int = NUM_SLICES) -> Timeline:
    """The steps of the slowest replica of a run."""
    replica = max(run.result.replicas, key=lambda replica: replica.time_s)
    return slice_steps(replica.steps, run.result.machine.capacity_tokens, num_slices)


def busy_charts(runs: Sequence[Forecast]) -> list[Html]:
    """Per run: the parts of time in which compute and memory were at work."""

    def chart(run: Forecast, line: Timeline, time: Axis) -> Chart:
        drawing = Chart(time, Axis("busy part of time", 0, 1, format=_percent), label=f"{run.name}: busy parts of time")
        xs = line.middles_s / _unit(runs)[0]
        drawing.area(xs, line.compute_share, "compute", "compute")
        drawing.area(xs, line.memory_share, "memory", "memory")
        return drawing

    return _charts(runs, "busy", chart)


def step_charts(runs: Sequence[Forecast]) -> list[Html]:
    """Per run: compute and memory time of a step, all on one scale."""
    lines = [timeline_of(run) for run in runs]
    highest = max(float(np.nanmax(np.maximum(line.compute_ms, line.memory_ms))) for line in lines)

    def chart(run: Forecast, line: Timeline, time: Axis) -> Chart:
        drawing = Chart(time, Axis("ms per step", 0, 1.05 * highest), label=f"{run.name}: time per step")
        xs = line.middles_s / _unit(runs)[0]
        drawing.area(xs, line.compute_ms, "compute", "compute")
        drawing.area(xs, line.memory_ms, "memory", "memory")
        return drawing

    return _charts(runs, "time per step", chart)


def kv_charts(runs: Sequence[Forecast]) -> list[Html]:
    """Per run: the part of the KV memory in use."""

    def chart(run: Forecast, line: Timeline, time: Axis) -> Chart:
        drawing = Chart(time, Axis("KV memory in use", 0, 1, format=_percent), label=f"{run.name}: KV use", height=200)
        drawing.area(line.middles_s / _unit(runs)[0], line.kv_share, "third")
        return drawing

    return _charts(runs, "KV use", chart)


def density_charts(runs: Sequence[Forecast], root_density: float) -> list[Html]:
    """Per run: compute over memory time of the steps, against that of the whole job."""

    def chart(run: Forecast, line: Timeline, time: Axis) -> Chart:
        axis = Axis("batch density (log)", *_DENSITY_RANGE, is_log=True)
        drawing = Chart(time, axis, label=f"{run.name}: batch density", height=200)
        drawing.line(line.middles_s / _unit(runs)[0], finite_density(line.density), "fourth")
        drawing.rule(root_density, f"whole job {format_number(root_density)}")
        return drawing

    return _charts(runs, "batch density", chart)


def finite_density(density: Floats) -> Floats:
    """Densities that a log axis can show: no memory time is drawn at its top."""
    return np.where(np.isinf(density), _DENSITY_RANGE[1], np.maximum(density, _DENSITY_RANGE[0]))


def _charts(runs: Sequence[Forecast], what: str, chart_of: ChartOf) -> list[Html]:
    seconds, unit = _unit(runs)
    time = Axis(f"{unit} since the start", 0, max(run.result.time_s for run in runs) / seconds)
    figures = []
    for run in runs:
        line = timeline_of(run)
        chart = chart_of(run, line, time)
        _add_hovers(chart, run, seconds)
        figures.append(figure(f"{run.name}: {what}, {format_duration(run.result.time_s)} in all", chart.render()))
    return figures


def _add_hovers(chart: Chart, run: Forecast, seconds: float) -> None:
    line = timeline_of(run, _NUM_HOVERS)
    rows = zip(
        line.middles_s, line.compute_ms, line.memory_ms, line.kv_share, line.density, line.compute_share, strict=True
    )
    titles = [
        f"{run.name} at {format_duration(at)}: compute {compute:.3g} ms and memory {memory:.3g} ms per step, "
        f"density {format_number(density)}, compute busy {format_share(busy)}, KV {format_share(kv)}"
        for at, compute, memory, kv, density, busy in rows
    ]
    chart.hover(line.edges_s / seconds, titles)


def _unit(runs: Sequence[Forecast]) -> tuple[float, str]:
    return time_unit(max(run.result.time_s for run in runs))


def _percent(value: float) -> str:
    return f"{value:.0%}"

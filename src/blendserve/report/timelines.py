"""Charts of simulated runs over time: the two resources, KV use, and the density of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from blendserve.report.format import format_duration, format_number, format_share, time_unit
from blendserve.report.html import Html, figure
from blendserve.report.series import Floats, Timeline, slice_steps
from blendserve.report.svg import Axis, Chart
from blendserve.simulator.forecast import Forecast

NUM_SLICES = 240
_NUM_HOVERS = 60
_DENSITY_RANGE = (0.01, 100.0)
_SIZE = (430, 190)


def timeline_of(run: Forecast, num_slices: int = NUM_SLICES) -> Timeline:
    """The steps of the slowest replica of a run, stretched to the time of the whole job and the size of its machine."""
    replica = max(run.result.replicas, key=lambda replica: replica.time_s)
    line = slice_steps(replica.steps, run.result.machine.capacity_tokens, num_slices)
    return replace(
        line,
        edges_s=line.edges_s * (run.time_s / run.result.time_s),
        compute_ms=line.compute_ms / run.factor,
        memory_ms=line.memory_ms / run.factor,
    )


def busy_charts(runs: Sequence[Forecast]) -> list[Html]:
    """Per run: the parts of time in which compute and memory were at work."""
    seconds, time = _time_axis(runs)
    figures = []
    for run in runs:
        line = timeline_of(run)
        chart = Chart(time, Axis("busy part of time", 0, 1, format=_percent), label=f"{run.name}: busy parts of time")
        chart.area(line.middles_s / seconds, line.compute_share, "compute", "compute")
        chart.area(line.middles_s / seconds, line.memory_share, "memory", "memory")
        _add_hovers(chart, run, seconds)
        figures.append(figure(f"{run.name}: {format_duration(run.time_s)}", chart.render()))
    return figures


def run_charts(runs: Sequence[Forecast], root_density: float) -> list[Html]:
    """Three per run: time per step, density of the batch, KV use. All runs on the same axes."""
    seconds, time = _time_axis(runs)
    lines = [timeline_of(run) for run in runs]
    step = Axis("ms per step", 0, 1.05 * max(_highest(line) for line in lines))
    figures = []
    for run, line in zip(runs, lines, strict=True):
        xs = line.middles_s / seconds
        charts = (
            _step_chart(line, xs, time, step),
            _density_chart(line, xs, time, root_density),
            _kv_chart(line, xs, time),
        )
        captions = (
            f"{run.name}, {format_duration(run.time_s)}: time per step",
            f"{run.name}: density of the batch",
            f"{run.name}: KV memory in use",
        )
        for chart, caption in zip(charts, captions, strict=True):
            _add_hovers(chart, run, seconds)
            figures.append(figure(caption, chart.render()))
    return figures


def _step_chart(line: Timeline, xs: Floats, time: Axis, step: Axis) -> Chart:
    chart = Chart(time, step, label="time per step", size=_SIZE)
    chart.area(xs, line.compute_ms, "compute", "compute")
    chart.area(xs, line.memory_ms, "memory", "memory")
    return chart


def _density_chart(line: Timeline, xs: Floats, time: Axis, root_density: float) -> Chart:
    chart = Chart(time, Axis("compute / memory (log)", *_DENSITY_RANGE, is_log=True), label="density", size=_SIZE)
    chart.line(xs, finite_density(line.density), "fourth")
    chart.rule(root_density, f"whole job {format_number(root_density)}")
    return chart


def _kv_chart(line: Timeline, xs: Floats, time: Axis) -> Chart:
    chart = Chart(time, Axis("in use", 0, 1, format=_percent), label="KV use", size=_SIZE)
    chart.area(xs, line.kv_share, "third")
    return chart


def finite_density(density: Floats) -> Floats:
    """Densities that a log axis can show: no memory time is drawn at its top."""
    return np.where(np.isinf(density), _DENSITY_RANGE[1], np.maximum(density, _DENSITY_RANGE[0]))


def _highest(line: Timeline) -> float:
    return float(np.nanmax(np.maximum(line.compute_ms, line.memory_ms)))


def _time_axis(runs: Sequence[Forecast]) -> tuple[float, Axis]:
    """Seconds of the unit, and one axis for all runs."""
    longest_s = max(run.time_s for run in runs)
    seconds, unit = time_unit(longest_s)
    return seconds, Axis(f"{unit} since the start", 0, longest_s / seconds)


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


def _percent(value: float) -> str:
    return f"{value:.0%}"

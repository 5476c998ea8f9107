"""The page of `blendserve run --report`: what the two resources did over a run, measured.

The paper shows the same of simulated runs (Figures 3 and 10); nothing here is simulated.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np

from blendserve.engines.native.measured import MATMUL_OPS, Floats, MeasuredRun
from blendserve.errors import ConfigError
from blendserve.executors.trace import StepSpans
from blendserve.report.format import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_share,
    plural,
    time_unit,
)
from blendserve.report.html import Html, element, figure, grid, page, section, table, tiles
from blendserve.report.series import Timeline, slice_steps
from blendserve.report.svg import Axis, Chart

_NUM_SLICES = 240
_NUM_HOVERS = 80
_WIDE, _HALF = (1280, 280), (630, 210)
_DENSITY_RANGE = (0.05, 20.0)
_NUM_LAYERS_SHOWN = 3


def write_page(path: Path, run: MeasuredRun) -> None:
    """Write the page. Raises: ConfigError when it cannot be written."""
    try:
        path.write_text(run_page(run), encoding="utf-8", errors="replace")  # names of files may be no text
    except OSError as error:
        raise ConfigError(f"cannot write the report {path}: {error.strerror}; choose another --report") from error


def run_page(run: MeasuredRun) -> str:
    """The whole page."""
    subtitle = (
        f"Measured: policy {run.policy}, {run.model} on {run.machine}, {plural(run.num_threads, 'thread')}, {run.isa}"
    )
    sections = [_tiles(run)]
    if run.num_steps:
        sections += [_resources(run), _throughput(run), *_one_step(run)]
    sections += [_where_time_went(run), _memory(run), _notes(run)]
    return page(f"Run of {run.source}", subtitle, sections)


def _tiles(run: MeasuredRun) -> Html:
    stats, peaks = run.stats, run.peaks
    num_tokens = stats.num_prompt_tokens + stats.num_output_tokens
    flop_per_s, bytes_per_s = run.compute_share * peaks.flop_per_s, run.memory_share * peaks.bytes_per_s
    entries = [
        ("Time of all steps", format_duration(run.elapsed_s), plural(run.num_steps, "step")),
        (
            "Throughput",
            f"{format_number(num_tokens / run.elapsed_s if run.elapsed_s else 0)} tok/s",
            f"{format_count(stats.num_prompt_tokens)} in, {format_count(stats.num_output_tokens)} out",
        ),
        ("Compute", format_share(run.compute_share), f"of peak: {flop_per_s / 1e9:.0f} GFLOP/s"),
        ("Memory", format_share(run.memory_share), f"of peak: {bytes_per_s / 1e9:.1f} GB/s"),
        ("Balance", f"{stats.balance:.2f}", "1: every step mixes both as the whole run does"),
        ("Prefix sharing", format_share(_sharing(run)), _best_sharing(run)),
        ("KV memory", format_share(stats.max_kv_tokens / max(1, stats.capacity_tokens)), "used at the peak"),
    ]
    if stats.resources is not None:
        resources = stats.resources
        entries.append(("Resident memory", format_bytes(resources.peak_rss_bytes), "at the peak"))
        if resources.startup_s is not None:
            remark = "from process start to the first step"
            entries.append(("Start-up", format_duration(resources.startup_s), remark))
    return tiles(entries)


def _resources(run: MeasuredRun) -> Html:
    line = _timeline(run)
    seconds, time = _time_axis(run)
    xs = line.middles_s / seconds
    top = max(1.0, float(np.nanmax([line.compute_share, line.memory_share])))
    both = Chart(time, Axis("share of peak", 0, top, format=_percent), label="compute and memory", size=_WIDE)
    both.area(xs, line.compute_share, "compute", "compute")
    both.area(xs, line.memory_share, "memory", "memory")
    both.rule(run.compute_share, f"compute, mean {format_share(run.compute_share)}")
    both.rule(run.memory_share, f"memory, mean {format_share(run.memory_share)}")
    _add_hovers(both, run, seconds)
    return section(
        "The two resources",
        "An order that blends requests keeps both level from the start to the end; an order that runs one kind of "
        "request after the other lets one resource idle while the other is full.",
        figure("Achieved share of the peak rates of arithmetic and of memory", both.render()),
    )


def _throughput(run: MeasuredRun) -> Html:
    line = _timeline(run)
    seconds, time = _time_axis(run)
    xs, width = line.middles_s / seconds, np.diff(line.edges_s)
    prefill, decode = line.num_prefill_tokens / width, line.num_decode_tokens / width
    rate = Chart(time, Axis("tokens/s computed", 0, _room(np.maximum(prefill, decode))), label="tokens", size=_HALF)
    rate.area(xs, prefill, "third", "prefill")
    rate.area(xs, decode, "fourth", "decode")
    mix = Chart(
        time, Axis("compute / memory (log)", *_DENSITY_RANGE, is_log=True), label="mix of the steps", size=_HALF
    )
    ratio = line.compute_share / np.maximum(line.memory_share, 1e-9)
    mix.line(xs, np.where(line.compute_share > 0, np.clip(ratio, *_DENSITY_RANGE), np.nan), "fourth")
    whole = run.compute_share / run.memory_share if run.memory_share else _DENSITY_RANGE[1]
    mix.rule(whole, f"whole run {format_number(whole)}")
    running = Chart(time, Axis("running sequences", 0, _room(line.num_running)), label="running sequences", size=_HALF)
    running.area(xs, line.num_running, "plain")
    kv = Chart(time, Axis("in use", 0, 1, format=_percent), label="KV memory", size=_HALF)
    kv.area(xs, line.kv_share, "third")
    charts = (
        (rate, "Tokens computed per second"),
        (mix, "What is mixed: level at the dashed line is balanced"),
        (running, "Sequences running"),
        (kv, "KV memory in use"),
    )
    for chart, _ in charts:
        _add_hovers(chart, run, seconds)
    return section(
        "What ran", "Over the same time; hover for figures.", grid(*(figure(c, chart.render()) for chart, c in charts))
    )


def _one_step(run: MeasuredRun) -> list[Html]:
    """Ops by worker, of a traced step of middling length that mixes prefill and decodes if any does."""
    log = run.stats.steps.columns()
    kept = [step for step in run.trace.kept if len(step.spans) and step.step < run.num_steps]
    is_mixed = (log["num_prefill_tokens"] > 0) & (log["num_decode_tokens"] > 0)
    kept = [step for step in kept if is_mixed[step.step]] or kept
    if not kept:
        return []
    lengths = run.trace.end_s - run.trace.begin_s
    middle_s = statistics.median_low([float(lengths[step.step]) for step in kept])
    step = next(step for step in kept if float(lengths[step.step]) == middle_s)
    layers = step.spans[:, 2]
    middle = int(layers.max()) // 2
    part = step.spans[(layers >= middle) & (layers < middle + _NUM_LAYERS_SHOWN)]
    last = min(int(layers.max()), middle + _NUM_LAYERS_SHOWN - 1)
    prefill, decode = int(log["num_prefill_tokens"][step.step]), int(log["num_decode_tokens"][step.step])
    return [
        section(
            "Inside one step",
            f"Step {step.step}: {plural(prefill, 'prefill token')}, {plural(decode, 'decode')}. Blue: matrix products; "
            "orange: attention; grey: everything else. One row per worker, the first on top; hover for the op.",
            figure(f"The whole step, {format_duration(middle_s)}", _gantt(run, step)),
            figure(f"Layers {middle} to {last} of it", _gantt(run, StepSpans(step.step, part))),
        )
    ]


def _gantt(run: MeasuredRun, step: StepSpans) -> Html:
    start_ns, end_ns = int(step.spans[:, 4].min()), int(step.spans[:, 5].max())
    seconds, unit = time_unit((end_ns - start_ns) / 1e9)
    workers = int(step.spans[:, 0].max()) + 1
    axis = Axis(unit, 0, (end_ns - start_ns) / 1e9 / seconds)
    rows = Axis("workers", 0, workers, format=lambda _: "")
    chart = Chart(axis, rows, label="ops by worker", size=(_WIDE[0], 70 + 34 * workers))
    for worker, op, layer, nano_batch, begin, end, busy in step.spans.tolist():
        name = run.op_names[op]
        style = "compute" if name in MATMUL_OPS else "memory" if name == "attention" else "plain"
        title = f"{name}, layer {layer}, nano-batch {nano_batch}: {busy / 1e3:.0f} us of {(end - begin) / 1e3:.0f}"
        low = workers - 1 - worker
        across = ((begin - start_ns) / 1e9 / seconds, (end - start_ns) / 1e9 / seconds)
        chart.block(across, (low + 0.08, low + 0.92), style, 0.85, title)
    return chart.render()


def _where_time_went(run: MeasuredRun) -> Html:
    by_op, counters = run.counters.seconds_by_op, run.counters
    total_s = sum(by_op.values())
    matmul_s = sum(seconds for name, seconds in by_op.items() if name in MATMUL_OPS)
    attention_s = by_op["attention"]

    def row(name: str, seconds: float, flop: float = 0.0, num_bytes: float = 0.0) -> tuple[str, ...]:
        rates = (amount / seconds / 1e9 if seconds and amount else None for amount in (flop, num_bytes))
        shown = ("" if rate is None else f"{rate:.1f}" for rate in rates)
        return (name, format_duration(seconds), format_share(seconds / total_s if total_s else 0.0), *shown)

    rows = [
        row("matrix products", matmul_s, counters.matmul_flop, counters.weight_bytes),
        row("attention", attention_s, counters.attention_flop, counters.kv_bytes),
        *(row(name, by_op[name]) for name in sorted(by_op, key=lambda n: -by_op[n]) if _is_other(name)),
    ]
    overlapped = plural(counters.num_overlapped_steps, "step")
    return section(
        "Where the time of steps went",
        f"Scheduling between steps took {format_duration(run.stats.scheduling_s)} beside it. Bytes are those that must "
        f"come from memory: weights once per step, KV once per sequence or shared prefix. In {overlapped} ops ran "
        "beside each other, and the time of each counts.",
        table(("op", "time", "share", "GFLOP/s", "GB/s"), rows),
    )


def _is_other(name: str) -> bool:
    return name not in MATMUL_OPS and name != "attention"


def _memory(run: MeasuredRun) -> Html:
    stats = run.stats
    if stats.resources is None:
        return Html("")
    resources = stats.resources
    used = int(resources.kv_bytes * stats.max_kv_tokens / max(1, stats.capacity_tokens))
    rows = [
        ("weights", "packed for the kernels", format_bytes(resources.weight_bytes)),
        ("KV cache", f"reserved; {format_bytes(used)} in use at the peak", format_bytes(resources.kv_bytes)),
        ("buffers of a step", "reserved", format_bytes(resources.workspace_bytes)),
        ("resident", "the whole process at its peak, mapped files included", format_bytes(resources.peak_rss_bytes)),
    ]
    return section("Memory", "", table(("", "", "size"), rows, num_text_columns=2))


def _notes(run: MeasuredRun) -> Html:
    peaks = run.peaks
    source = (
        "as `blendserve calibrate` measured them on this machine"
        if peaks.is_measured
        else "a built-in guess: run `blendserve calibrate` for shares that mean something"
    )
    notes = [
        f"Peaks: {peaks.flop_per_s / 1e9:.0f} GFLOP/s and {peaks.bytes_per_s / 1e9:.1f} GB/s on {run.num_threads} "
        f"threads, {source}.",
        "Compute counts all matrix products and attention; memory counts what has to come from it at least. A cache "
        "that holds weights or KV serves them faster than memory would.",
        f"Curves are means over {min(_NUM_SLICES, run.num_steps)} slices of time, gaps between steps included.",
        "Balance is the sum over steps of the lesser of the step's part of all compute and its part of all memory "
        "work.",
    ]
    if run.trace.kept:
        notes.append(f"Ops were recorded in {plural(len(run.trace.kept), 'step')}, one in {run.trace.stride}.")
    return section("Notes", "", element("ul", *(element("li", note) for note in notes)))


def _timeline(run: MeasuredRun, num_slices: int = _NUM_SLICES) -> Timeline:
    return slice_steps(run.steps(), run.stats.capacity_tokens, num_slices)


def _time_axis(run: MeasuredRun) -> tuple[float, Axis]:
    seconds, unit = time_unit(run.elapsed_s)
    return seconds, Axis(f"{unit} since the first step", 0, run.elapsed_s / seconds)


def _add_hovers(chart: Chart, run: MeasuredRun, seconds: float) -> None:
    line = _timeline(run, _NUM_HOVERS)
    rows = zip(
        line.middles_s.tolist(),
        line.compute_share.tolist(),
        line.memory_share.tolist(),
        line.num_running.tolist(),
        line.kv_share.tolist(),
        strict=True,
    )
    titles = [
        f"at {format_duration(at)}: compute {format_share(compute)} ({compute * run.peaks.flop_per_s / 1e9:.0f} "
        f"GFLOP/s), memory {format_share(memory)} ({memory * run.peaks.bytes_per_s / 1e9:.1f} GB/s), "
        f"{running:.0f} running, KV {format_share(kv)}"
        for at, compute, memory, running, kv in rows
    ]
    chart.hover(line.edges_s / seconds, titles)


def _sharing(run: MeasuredRun) -> float:
    return run.stats.prefix_hit_rate


def _best_sharing(run: MeasuredRun) -> str:
    return "" if run.optimal_sharing is None else f"{format_share(run.optimal_sharing)} at best"


def _room(values: Floats) -> float:
    return max(1e-9, 1.05 * float(np.nanmax(values)))


def _percent(value: float) -> str:
    return f"{value:.0%}"

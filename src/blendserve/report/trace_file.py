"""A run as a Chrome trace, for chrome://tracing and ui.perfetto.dev: ops by worker, and what the two resources did.

Times are microseconds since the first step began. The file is bounded: ops are there for some steps of a long run,
counters are means over slices of it, and the file says which.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blendserve.engines.native.measured import MATMUL_OPS, MeasuredRun
from blendserve.errors import ConfigError
from blendserve.executors.trace import StepSpans
from blendserve.report.series import slice_steps

MAX_POINTS = 4000
"""Of every counter, and of spans on the track of the steps."""

_PROCESS = 1
_STEPS_THREAD = 1


def write_trace(path: Path, run: MeasuredRun) -> None:
    """Write the whole file. Raises: ConfigError when it cannot be written."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit":"ms","otherData":')
            json.dump(_facts(run), file)
            file.write(',"traceEvents":[\n')
            for number, event in enumerate(_events(run)):
                file.write((",\n" if number else "") + json.dumps(event, separators=(",", ":")))
            file.write("\n]}\n")
    except OSError as error:
        raise ConfigError(f"cannot write the trace {path}: {error.strerror}; choose another --trace") from error


def _facts(run: MeasuredRun) -> dict[str, Any]:
    peaks = run.peaks
    return {
        "source": run.source,
        "model": run.model,
        "policy": run.policy,
        "machine": run.machine,
        "num_threads": run.num_threads,
        "isa": run.isa,
        "num_steps": run.num_steps,
        "ops": f"of every {run.trace.stride}. step" if run.trace.stride > 1 else "of every step",
        "counters": f"means over {min(MAX_POINTS, run.num_steps)} slices of the run",
        "shares": f"of {peaks.flop_per_s / 1e9:.0f} GFLOP/s and {peaks.bytes_per_s / 1e9:.1f} GB/s, "
        + ("as calibrated" if peaks.is_measured else "a built-in guess: run `blendserve calibrate`"),
    }


def _events(run: MeasuredRun) -> Iterator[dict[str, Any]]:
    yield _name("process_name", _STEPS_THREAD, f"{run.policy}: {run.source}")
    yield _name("thread_name", _STEPS_THREAD, "steps")
    for worker in range(run.num_threads):
        yield _name("thread_name", worker + 2, f"worker {worker}")
    yield from _counters(run)
    yield from _steps(run)
    for kept in run.trace.kept:
        yield from _ops(run, kept)


def _name(kind: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": thread, "args": {"name": name}}


def _counters(run: MeasuredRun) -> Iterator[dict[str, Any]]:
    line = slice_steps(run.steps(), run.stats.capacity_tokens, MAX_POINTS)
    tracks = (
        ("compute share", "%", 100 * line.compute_share),
        ("memory share", "%", 100 * line.memory_share),
        ("running sequences", "sequences", line.num_running),
        ("KV use", "%", 100 * line.kv_share),
    )
    for name, unit, values in tracks:
        for at_s, value in zip(line.edges_s[:-1].tolist(), values.tolist(), strict=True):
            yield _counter(name, at_s, {unit: round(value, 2)})
        yield _counter(name, float(line.edges_s[-1]), {unit: 0})


def _counter(name: str, at_s: float, values: dict[str, float]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": _PROCESS, "ts": round(at_s * 1e6, 3), "args": values}


def _steps(run: MeasuredRun) -> Iterator[dict[str, Any]]:
    """Evenly chosen steps where there are many, among them those whose ops are there."""
    log = run.stats.steps.columns()
    begin_s, end_s = run.trace.begin_s - run.start_s, run.trace.end_s - run.start_s
    chosen = {*range(0, run.num_steps, -(-run.num_steps // MAX_POINTS) or 1)}
    chosen |= {kept.step for kept in run.trace.kept if kept.step < run.num_steps}
    for step in sorted(chosen):
        elapsed_s = max(1e-9, float(end_s[step] - begin_s[step]))
        values = {
            "prefill tokens": int(log["num_prefill_tokens"][step]),
            "decode tokens": int(log["num_decode_tokens"][step]),
            "compute share": round(float(log["compute_s"][step]) / elapsed_s, 3),
            "memory share": round(float(log["memory_s"][step]) / elapsed_s, 3),
        }
        yield _span(f"step {step}", "step", _STEPS_THREAD, float(begin_s[step]), elapsed_s, values)


def _ops(run: MeasuredRun, kept: StepSpans) -> Iterator[dict[str, Any]]:
    start_ns = run.start_s * 1e9
    for worker, op, layer, nano_batch, begin_ns, end_ns, busy_ns in kept.spans.tolist():
        name = run.op_names[op]
        kind = "compute" if name in MATMUL_OPS else "memory" if name == "attention" else "other"
        values = {"layer": layer, "nano_batch": nano_batch, "busy_us": busy_ns / 1e3}
        yield _span(name, kind, worker + 2, (begin_ns - start_ns) / 1e9, (end_ns - begin_ns) / 1e9, values)


def _span(
    name: str, kind: str, thread: int, begin_s: float, elapsed_s: float, values: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": kind,
        "pid": _PROCESS,
        "tid": thread,
        "ts": round(begin_s * 1e6, 3),
        "dur": round(elapsed_s * 1e6, 3),
        "args": values,
    }

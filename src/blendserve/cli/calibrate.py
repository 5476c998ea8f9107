"""`blendserve calibrate`: measure this machine and store what plans and simulations of it need."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.options import add_dtype, add_kv_dtype, positive_integer, tell
from blendserve.costs.step_cost import SEQUENTIAL, Interference
from blendserve.host import cache_dir, usable_cores
from blendserve.report.format import plural

if TYPE_CHECKING:
    from blendserve.calibration.measure import Measurements, SideBySide, Spread

_BUSY_LOAD_PER_CORE = 0.5


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help=HELP_BY_COMMAND["calibrate"],
        description="Measure this machine with the engine's own kernels on random weights: matrix products, memory "
        "bandwidth, attention, and how well they share the cores. `run` plans with the stored result; `plan` and "
        "`simulate` call it this-machine. Run nothing else on the machine meanwhile.",
    )
    parser.add_argument(
        "--threads",
        type=positive_integer,
        metavar="N",
        help="threads to measure with (default: one for every core that this process may use)",
    )
    add_dtype(parser)
    add_kv_dtype(parser)
    parser.add_argument(
        "--quick", action="store_true", help="measure for a few seconds, less exactly (default: up to a minute)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the measurements as one JSON object (default: as text)"
    )
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Measure, store and print."""
    from blendserve.calibration.measure import (  # loads the native core, which --help does not need
        FULL,
        QUICK,
        calibrate,
    )

    num_threads = args.threads or usable_cores()
    load = os.getloadavg()[0]
    if load > _BUSY_LOAD_PER_CORE * usable_cores():
        tell(f"note: the load average is {load:.1f}: what else runs here will be measured too")
    tell(f"measuring with {plural(num_threads, 'thread')} ...")
    measured = calibrate(num_threads, QUICK if args.quick else FULL, dtype=args.dtype, kv_dtype=args.kv_dtype)
    path = measured.calibration.save(cache_dir())
    print(json.dumps(_as_json(measured)) if args.json else describe(measured))
    tell(f"wrote {path}")
    return 0


def describe(measured: Measurements) -> str:
    """The measurements as tables: medians, and the least and most of the repeats."""
    found = measured.calibration
    lines = [
        f"{found.machine}, {plural(found.num_threads, 'thread')}, weights in {found.dtype}, KV in {found.kv_dtype}",
        "",
    ]
    lines += ["matrix products" + " " * 38 + "step without attention"]
    lines += [f"{'tokens':>10}  {'GFLOP/s (least - most)':<30}{'measured':>16}{'modelled':>16}"]
    lines += [
        f"{point.num_tokens:>10}  {_in_giga(point.flop_per_s):<30}"
        f"{_in_ms(point.step_s):>16}{_in_ms(point.modelled_s):>16}"
        for point in measured.gemm
    ]
    lines += ["", "decode attention", f"{'threads':>10}  GB/s of KV (least - most)"]
    lines += [f"{count:>10}  {_in_giga(rate)}" for count, rate in measured.kv_bytes_per_s_by_threads]
    lines += [
        "",
        f"prefill attention   {_in_giga(measured.prefill_attention_flop_per_s)} GFLOP/s",
        f"weights streaming   {_in_giga(measured.weight_bytes_per_s)} GB/s in a step of one token",
        f"constant of a layer {measured.layer_constant_s.median * 1e6:.1f} us",
        f"between two steps   {_in_ms(measured.loop_s)} of scheduling",
        "",
        *_describe_sharing(measured.side_by_side, found.num_threads),
        "",
        *_describe_overlap(measured),
    ]
    return "\n".join(lines)


def _describe_sharing(side: SideBySide | None, num_threads: int) -> list[str]:
    if side is None:
        return ["side by side: needs two threads or more, not measured"]
    half, total = num_threads // 2, side.gemm_beside.median + side.attention_beside.median
    verdict = (
        f"together {total:.2f} of a machine: at most {total:.2f}x from running them side by side on separate cores"
        if total > 1
        else f"together {total:.2f} of a machine: running them side by side on separate cores gains nothing"
    )
    return [
        f"on {half} of {num_threads} threads, as shares of the rate on all (least - most)",
        f"{'':<18}  {'alone':<20}  beside the other",
        f"matrix products     {_as_share(side.gemm_alone):<20}  {_as_share(side.gemm_beside)}",
        f"decode attention    {_as_share(side.attention_alone):<20}  {_as_share(side.attention_beside)}",
        verdict,
    ]


def _describe_overlap(measured: Measurements) -> list[str]:
    found = measured.calibration
    num_decodes = measured.overlap[0].num_decodes
    lines = [f"{'prompt tokens':>13}  steps of {num_decodes} decodes: apart, side by side in each core"]
    lines += [
        f"{trial.num_prompt_tokens:>13}  {_in_ms(trial.off_s)}, {_in_ms(trial.on_s)}: {trial.off_s / trial.on_s:.3f}x "
        f"({trial.cost.chunk_bytes >> 10} KiB, {trial.cost.iteration_bytes} bytes per iteration)"
        for trial in measured.overlap
    ]
    delays = (found.compute_delay, found.memory_delay)
    if Interference(*delays) == SEQUENTIAL:
        return [*lines, "No gain: `--overlap auto` leaves it off, and plans count on step times that add up."]
    return [
        *lines,
        f"`--overlap auto` counts on max(c + {delays[0]:.2f} m, m + {delays[1]:.2f} c) for steps of c seconds of "
        "compute and m of memory.",
    ]


def _as_json(measured: Measurements) -> dict[str, object]:
    side = measured.side_by_side
    return {
        "calibration": asdict(measured.calibration),
        "gemm": [{**point._asdict(), "flop_per_s": point.flop_per_s._asdict()} for point in measured.gemm],
        "kv_bytes_per_s": [
            {"num_threads": count, **rate._asdict()} for count, rate in measured.kv_bytes_per_s_by_threads
        ],
        "weight_bytes_per_s": measured.weight_bytes_per_s._asdict(),
        "prefill_attention_flop_per_s": measured.prefill_attention_flop_per_s._asdict(),
        "layer_constant_s": measured.layer_constant_s._asdict(),
        "loop_s": measured.loop_s,
        "overlap": [
            {
                "num_prompt_tokens": trial.num_prompt_tokens,
                "off_s": trial.off_s,
                "on_s": trial.on_s,
                **asdict(trial.cost),
            }
            for trial in measured.overlap
        ],
        "side_by_side": side and {name: share._asdict() for name, share in side._asdict().items()},
    }


def _in_giga(rate: Spread) -> str:
    return f"{rate.median / 1e9:.1f} ({rate.low / 1e9:.1f} - {rate.high / 1e9:.1f})"


def _as_share(share: Spread) -> str:
    return f"{share.median:.2f} ({share.low:.2f} - {share.high:.2f})"


def _in_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"

"""Does the short measurement of a first run agree with the thorough one? Both in turn, and what they would decide.

    python bench/calibrations.py [--dtype int8] [--repeats 3]

Nothing is stored. A rate agrees where its median over the repeats lies within `--within` of the thorough one. Run
nothing else on the machine meanwhile: three repeats take about four minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import common

from blendserve.calibration.measure import FIRST_RUN, FULL, QUICK, calibrate
from blendserve.calibration.step_probe import Effort
from blendserve.config import BYTES_PER_WEIGHT, DTYPES
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import Interference
from blendserve.costs.stored_calibration import Calibration
from blendserve.host import usable_cores
from blendserve.models.known import SMOLLM2_135M

EFFORT_BY_NAME: dict[str, Effort] = {effort.name: effort for effort in (FIRST_RUN, QUICK, FULL)}
MOST_FIRST_RUN_S = 3.0


class Taken(NamedTuple):
    """One measurement and how long it took."""

    calibration: Calibration
    elapsed_s: float


def figures(calibration: Calibration) -> dict[str, float]:
    """What plans and steps are decided by. Units as named."""
    model = ModelCost.from_spec(SMOLLM2_135M, bytes_per_weight=BYTES_PER_WEIGHT[calibration.dtype])
    cost = calibration.step_cost(model)
    density = cost.token_s / (cost.kv_token_s * 1000)
    return {
        "matrix products, GFLOP/s": calibration.gemm_flop_per_s / 1e9,
        "weights, GB/s": calibration.weight_bytes_per_s / 1e9,
        "KV, GB/s": calibration.kv_bytes_per_s / 1e9,
        "prefill attention, GFLOP/s": calibration.prefill_attention_flop_per_s / 1e9,
        "a token over reading 1,000 of KV": density,
        "step of 1 decode, ms": 1e3 * cost.elapsed_s(1, 500),
        "step of 64 decodes after 1,000, ms": 1e3 * cost.elapsed_s(64, 64_000),
        "step of 512 prompt tokens, ms": 1e3 * cost.elapsed_s(512, 0, 512 * 512 / 2),
    }


def is_overlapped(calibration: Calibration) -> bool:
    return Interference(calibration.compute_delay, calibration.memory_delay).hides_time


def table(by_effort: dict[str, Sequence[Taken]], within: float) -> str:
    """A row per figure: medians, each over the thorough one."""
    names = list(by_effort)
    rows = []
    for name in figures(by_effort[names[-1]][0].calibration):
        values = {e: median(figures(one.calibration)[name] for one in taken) for e, taken in by_effort.items()}
        last = values[names[-1]]
        ratios = [values[e] / last for e in names[:-1]]
        off = [e for e, ratio in zip(names, ratios, strict=False) if abs(ratio - 1) > within]
        shown = [f"{values[e]:.2f} ({ratio:.2f}x)" for e, ratio in zip(names, ratios, strict=False)]
        rows.append([name, *shown, f"{last:.2f}", ", ".join(off) or "agrees"])
    overlap = [
        f"{sum(is_overlapped(one.calibration) for one in taken)} of {len(taken)}" for taken in by_effort.values()
    ]
    seconds = [common.summarise([one.elapsed_s for one in taken]).text(1) for taken in by_effort.values()]
    rows.append(["plans count on overlap", *overlap, "agrees" if len(set(overlap)) == 1 else "differs"])
    rows.append(["takes, s", *seconds, ""])
    return common.table(["", *names, f"within {within:.0%}"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="of weights (int8)")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--efforts", default=",".join(EFFORT_BY_NAME), help="the last one is what others are held to")
    parser.add_argument("--within", type=float, default=0.1, help="share that a figure may be off (0.1)")
    arguments = parser.parse_args()
    common.print_header()
    by_effort: dict[str, list[Taken]] = {name: [] for name in arguments.efforts.split(",")}
    watch = common.Watch()
    for _ in range(arguments.repeats):
        for name, taken in by_effort.items():
            started_s = time.perf_counter()
            measured = calibrate(arguments.threads, EFFORT_BY_NAME[name], dtype=arguments.dtype)
            taken.append(Taken(measured.calibration, time.perf_counter() - started_s))
            print(f"{name}: {taken[-1].elapsed_s:.1f} s", flush=True)
    print("\n" + table(dict(by_effort), arguments.within))
    print(f"\nother processes took {watch.others():.0%} of the machine")
    first = [one.elapsed_s for one in by_effort.get("first-run", [])]
    if first and median(first) > MOST_FIRST_RUN_S:
        print(f"the first run took {median(first):.1f} s to measure, more than {MOST_FIRST_RUN_S:.0f}")
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Steps with overlap against the same steps without it, on the native engine: `python bench/overlap.py`.

Decodes with prompts beside them, decodes alone and prompts alone, each off and on in turn; medians with their range.
Random weights of the default model's shape with a fifth of its layers and without its head, so that filling the KV
memory takes seconds. `auto` takes what `blendserve calibrate` stored; without that it overlaps nothing.

`share` is the bound max(flop / peak flop/s, bytes / peak bytes/s) of the work over the median time, at the highest
rates of one op alone that the same process measured: matrix products of a prompt, decode attention or weights
streaming.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import dataclass, replace

from common import print_header, summarise, table

from blendserve.calibration.step_probe import Probe, Work, median
from blendserve.config import DTYPES, OVERLAP_MODES
from blendserve.costs.hardware import Peaks
from blendserve.costs.step_cost import OverlapCost
from blendserve.costs.this_machine import overlap_cost_of
from blendserve.host import usable_cores
from blendserve.models.known import SMOLLM2_135M

SHAPE = replace(SMOLLM2_135M, num_layers=SMOLLM2_135M.num_layers // 5, vocab_size=256)


@dataclass(frozen=True, slots=True)
class Mix:
    """What a step holds: decodes (all sequences of the probe but one, or none), and tokens of a prompt."""

    name: str
    has_decodes: bool
    num_prompt_tokens: int

    def run(self, probe: Probe) -> tuple[float, Work]:
        """Seconds of one step by the clock, and its work."""
        started = time.perf_counter()
        work = probe.mixed(self.num_prompt_tokens) if self.has_decodes else probe.prefill(self.num_prompt_tokens)
        return time.perf_counter() - started, work


def mixes(num_sequences: int) -> list[Mix]:
    return [
        Mix("balanced", True, num_sequences // 4),
        Mix("more compute", True, num_sequences),
        Mix("decode alone", True, 0),
        Mix("prefill alone", False, 512),
    ]


def measured_peaks(probe: Probe, num_rounds: int) -> Peaks:
    probe.set_overlap("off", OverlapCost())
    prompts = [probe.prefill(512) for _ in range(num_rounds)]
    decodes = [probe.decode() for _ in range(num_rounds)]
    single = [probe.prefill(1) for _ in range(num_rounds)]
    flop_per_s = max(work.matmul_flop_per_s for work in prompts)
    rates = [work.kv_bytes_per_s for work in decodes] + [work.weight_bytes / work.matmul_s for work in single]
    return Peaks(flop_per_s, max(rates), is_measured=True)


def row(probe: Probe, mix: Mix, mode: str, cost: OverlapCost, peaks: Peaks, num_rounds: int) -> list[str]:
    """The figures of one mix, off and on in turn."""
    times: dict[str, list[float]] = {"off": [], mode: []}
    work: Work | None = None
    for _ in range(num_rounds):
        for name, samples in times.items():
            probe.set_overlap(name, cost)
            elapsed_s, done = mix.run(probe)
            samples.append(elapsed_s)
            work = done if name == "off" else work
    assert work is not None
    off, on = (summarise([1e3 * value for value in samples]) for samples in times.values())
    flop, num_bytes = work.matmul_flop + work.attention_flop, work.weight_bytes + work.kv_bytes
    on_s = median(times[mode])
    bound_s = max(flop / peaks.flop_per_s, num_bytes / peaks.bytes_per_s)
    return [
        mix.name,
        off.text(1),
        on.text(1),
        f"{off.median / on.median:.3f}",
        f"{flop / on_s / 1e9:.0f}",
        f"{num_bytes / on_s / 1e9:.1f}",
        f"{bound_s / median(times['off']):.2f}",
        f"{bound_s / on_s:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=[mode for mode in OVERLAP_MODES if mode != "off"], default="on")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--sequences", type=int, default=96, help="that decode at once (96)")
    parser.add_argument("--context", type=int, default=1024, help="tokens that each of them reads (1024)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights (bf16)")
    parser.add_argument("--chunk-bytes", type=int, help="of KV fetched beside one tile of a matrix product")
    parser.add_argument("--tile-flop", type=int, help="of such a tile")
    parser.add_argument("--iteration-bytes", type=int, help="fetched per iteration of its inner loop")
    parser.add_argument("--memory-lanes", type=int, help="threads that may hold attention; 0: all")
    arguments = parser.parse_args()
    cost = overlap_cost_of(arguments.threads, arguments.dtype) or OverlapCost()
    given = {name: getattr(arguments, name) for name in ("chunk_bytes", "tile_flop", "iteration_bytes", "memory_lanes")}
    cost = replace(cost, **{name: value for name, value in given.items() if value is not None})
    print_header()
    with closing(
        Probe(
            SHAPE,
            num_threads=arguments.threads,
            num_sequences=arguments.sequences,
            max_tokens=512 + 2 * arguments.sequences,
            context=arguments.context,
            dtype=arguments.dtype,
        )
    ) as probe:
        probe.touch()
        peaks = measured_peaks(probe, arguments.rounds)
        print(
            f"peaks of one op alone: {peaks.flop_per_s / 1e9:.0f} GFLOP/s, {peaks.bytes_per_s / 1e9:.1f} GB/s; {cost}"
        )
        rows = [row(probe, mix, arguments.mode, cost, peaks, arguments.rounds) for mix in mixes(arguments.sequences)]
    columns = [
        "step",
        "off ms",
        f"{arguments.mode} ms",
        "speedup",
        "GFLOP/s",
        "GB/s",
        "share off",
        f"share {arguments.mode}",
    ]
    print(table(columns, rows))


if __name__ == "__main__":
    main()

"""Steps with overlap against the same steps without it, on the native engine.

    python bench/overlap.py [--dtype int8]
    python bench/overlap.py --starved        one thread, alone and beside a process that streams memory on another core

Decodes with prompts beside them, decodes alone and prompts alone, each off and on in turn; medians with their range.
The balanced step has as many tokens of a prompt as make its compute take as long as the attention of its decodes. The
bench looks for that number first, without overlap. The two steps beside it have half and twice as many.
Random weights of the default model's shape, or of a 1B Llama's (`--shape llama-1b`), with a fifth of its layers and
without its head, so that filling the KV memory takes seconds. `auto` takes what `blendserve calibrate` stored; without
that it overlaps nothing.

`share` is the bound max(flop / peak flop/s, bytes / peak bytes/s) of the work over the median time, at the highest
rates of one op alone that the same process measured: matrix products of a prompt, decode attention or weights
streaming. On a server whose cores are all in use each core gets a fifth of the bandwidth that it gets on a small
machine; `--starved` imitates that: memory time weighs more, and overlap is worth more.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from common import print_header, summarise, table

from blendserve.calibration.step_probe import Probe, Work, median
from blendserve.config import DTYPES, OVERLAP_MODES
from blendserve.costs.hardware import Peaks
from blendserve.costs.step_cost import OverlapCost
from blendserve.costs.this_machine import overlap_cost_of
from blendserve.host import usable_cores
from blendserve.models.known import SMOLLM2_135M

PROMPT_TOKENS = 512
TOKEN_STEP = 8
"""Of the search for a balanced step."""
STREAM_BYTES = 256 << 20
"""Far more than the caches hold."""
LLAMA_1B = replace(
    SMOLLM2_135M,
    name="llama-1b",
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
)
SHAPES = {
    spec.name: replace(spec, num_layers=spec.num_layers // 5, vocab_size=256) for spec in (SMOLLM2_135M, LLAMA_1B)
}


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


def balanced_tokens(compute_lead: Callable[[int], float], most: int) -> int:
    """The fewest prompt tokens whose step has compute for as long as its decodes have attention, at most `most`.
    `compute_lead` is the difference in seconds, by the number of tokens."""
    low, high = 0, most // TOKEN_STEP
    while low < high:
        middle = (low + high) // 2
        if compute_lead(middle * TOKEN_STEP) >= 0:
            high = middle
        else:
            low = middle + 1
    return low * TOKEN_STEP


def measured_balance(probe: Probe, num_rounds: int) -> int:
    """Prompt tokens of a balanced step of this probe. All but the decodes' attention counts as compute."""
    probe.set_overlap("off", OverlapCost())
    memory_s = median([probe.decode().attention_s for _ in range(num_rounds)])

    def compute_lead(num_tokens: int) -> float:
        return median([probe.mixed(num_tokens).elapsed_s for _ in range(num_rounds)]) - 2 * memory_s

    return balanced_tokens(compute_lead, PROMPT_TOKENS // 2)


def mixes(num_balanced: int) -> list[Mix]:
    return [
        Mix(f"more memory ({num_balanced // 2})", True, num_balanced // 2),
        Mix(f"balanced ({num_balanced})", True, num_balanced),
        Mix(f"more compute ({2 * num_balanced})", True, 2 * num_balanced),
        Mix("decode alone", True, 0),
        Mix("prefill alone", False, PROMPT_TOKENS),
    ]


def measured_peaks(probe: Probe, num_rounds: int) -> Peaks:
    probe.set_overlap("off", OverlapCost())
    prompts = [probe.prefill(PROMPT_TOKENS) for _ in range(num_rounds)]
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


def stream(cores: set[int], report: Any) -> None:
    """Read memory on the given cores for ever; tells how many bytes so far, and when."""
    os.sched_setaffinity(0, cores)
    values = np.ones(STREAM_BYTES // 8)
    num_bytes = 0
    while True:
        values.sum()
        num_bytes += values.nbytes
        report[:] = [num_bytes, time.monotonic()]


@contextmanager
def neighbours(cores: Sequence[int]) -> Iterator[list[Any]]:
    """A streaming process on each of the cores; yields what each last told."""
    context = multiprocessing.get_context("spawn")
    reports = [context.Array("d", 2, lock=False) for _ in cores]
    processes = [
        context.Process(target=stream, args=({core}, report), daemon=True)
        for core, report in zip(cores, reports, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        while not all(report[0] for report in reports):
            time.sleep(0.01)
        yield reports
    finally:
        for process in processes:
            process.kill()
            process.join()


def measure(arguments: argparse.Namespace, cost: OverlapCost) -> None:
    """Print the table of all mixes."""
    with closing(
        Probe(
            SHAPES[arguments.shape],
            num_threads=arguments.threads,
            num_sequences=arguments.sequences,
            max_tokens=PROMPT_TOKENS + 2 * arguments.sequences,
            context=arguments.context,
            dtype=arguments.dtype,
        )
    ) as probe:
        probe.touch()
        peaks = measured_peaks(probe, arguments.rounds)
        print(
            f"peaks of one op alone: {peaks.flop_per_s / 1e9:.0f} GFLOP/s, {peaks.bytes_per_s / 1e9:.1f} GB/s; {cost}"
        )
        num_balanced = measured_balance(probe, min(arguments.rounds, 3))
        rows = [row(probe, mix, arguments.mode, cost, peaks, arguments.rounds) for mix in mixes(num_balanced)]
    shares = ["share off", f"share {arguments.mode}"]
    print(table(["step", "off ms", f"{arguments.mode} ms", "speedup", "GFLOP/s", "GB/s", *shares], rows), flush=True)


def measure_starved(arguments: argparse.Namespace, cost: OverlapCost) -> None:
    """One thread on the first core: alone, then with a streaming process on each of the others."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise SystemExit("--starved needs two cores: one for the engine and one for a process that streams memory")
    os.sched_setaffinity(0, {first})
    print("\n### one thread alone\n")
    measure(arguments, cost)
    os.sched_setaffinity(0, {first, *others})  # for the processes that are started
    with neighbours(others) as reports:
        os.sched_setaffinity(0, {first})
        before = [tuple(report) for report in reports]
        print(f"\n### one thread beside {len(others)} that stream memory\n")
        measure(arguments, cost)
        rates = [
            (report[0] - then[0]) / max(report[1] - then[1], 1e-9) for report, then in zip(reports, before, strict=True)
        ]
    print(f"\nbeside it: {sum(rates) / 1e9:.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=[mode for mode in OVERLAP_MODES if mode != "off"], default="on")
    parser.add_argument("--shape", choices=SHAPES, default=SMOLLM2_135M.name)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--sequences", type=int, default=96, help="that decode at once (96)")
    parser.add_argument("--context", type=int, default=1024, help="tokens that each of them reads (1024)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights (bf16)")
    parser.add_argument("--chunk-bytes", type=int, help="of KV fetched beside one tile of a matrix product")
    parser.add_argument("--tile-flop", type=int, help="of such a tile")
    parser.add_argument("--iteration-bytes", type=int, help="fetched per iteration of its inner loop")
    parser.add_argument("--starved", action="store_true", help="one thread, alone and beside one that streams memory")
    parser.add_argument("--memory-lanes", type=int, help="threads that may hold attention; 0: all")
    arguments = parser.parse_args()
    if arguments.context < PROMPT_TOKENS:
        parser.error(f"--context is {arguments.context}; a prompt of {PROMPT_TOKENS} tokens has to fit into it")
    if arguments.starved:
        arguments.threads = 1
    cost = overlap_cost_of(arguments.threads, arguments.dtype) or OverlapCost()
    given = {name: getattr(arguments, name) for name in ("chunk_bytes", "tile_flop", "iteration_bytes", "memory_lanes")}
    cost = replace(cost, **{name: value for name, value in given.items() if value is not None})
    print_header()
    (measure_starved if arguments.starved else measure)(arguments, cost)


if __name__ == "__main__":
    main()

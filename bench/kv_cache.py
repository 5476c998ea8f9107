"""What the int8 KV cache saves in decodes that wait for memory: `python bench/kv_cache.py [--threads 2]`.

Steps of one token of each sequence at the end of its context, random weights of the default model, over a KV cache in
bf16 and in int8, in turn; medians, and the least and most. GB/s are of the bytes that each cache holds.
"""

from __future__ import annotations

import argparse
from contextlib import closing

import common

from blendserve.calibration.step_probe import Probe, Work, median
from blendserve.config import DTYPES, KV_DTYPES, KvDtype
from blendserve.costs.step_cost import OverlapCost
from blendserve.costs.this_machine import overlap_cost_of
from blendserve.host import usable_cores
from blendserve.models.known import SMOLLM2_135M


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: every core")
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="of weights (default: int8)")
    parser.add_argument("--sequences", type=int, default=96, help="decodes of a step (default: 96)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each (default: 1024)")
    parser.add_argument("--overlap", choices=("off", "on"), default="off", help="default: off")
    parser.add_argument("--rounds", type=int, default=9, help="steps over each cache (default: 9)")
    given = parser.parse_args()
    common.print_header()
    works = measure(given)
    print(
        f"{SMOLLM2_135M.name}, weights in {given.dtype}, {given.threads} threads, overlap {given.overlap}: "
        f"{given.sequences} decodes over {given.context} tokens\n"
    )
    print(
        common.table(
            ["KV", "step", "tokens/s", "attention", "KV of a step", "KV"],
            [row(kv_dtype, given.sequences, of_kv) for kv_dtype, of_kv in works.items()],
        )
    )
    steps = {kv_dtype: median([work.elapsed_s for work in of_kv]) for kv_dtype, of_kv in works.items()}
    attention = {kv_dtype: median([work.attention_s for work in of_kv]) for kv_dtype, of_kv in works.items()}
    print(f"\nint8 over bf16: step {steps['bf16'] / steps['int8']:.2f}x, ", end="")
    print(f"attention {attention['bf16'] / attention['int8']:.2f}x")


def measure(given: argparse.Namespace) -> dict[KvDtype, list[Work]]:
    """Steps over each cache, in turn."""
    cost = overlap_cost_of(given.threads, given.dtype) or OverlapCost()

    def probe(kv_dtype: KvDtype) -> Probe:
        made = Probe(
            SMOLLM2_135M,
            num_threads=given.threads,
            num_sequences=given.sequences,
            max_tokens=given.sequences,
            context=given.context,
            dtype=given.dtype,
            kv_dtype=kv_dtype,
        )
        made.set_overlap(given.overlap, cost)
        made.touch()
        return made

    works: dict[KvDtype, list[Work]] = {kv_dtype: [] for kv_dtype in KV_DTYPES}
    with closing(probe("bf16")) as bf16, closing(probe("int8")) as int8:
        for one in (bf16, int8):
            one.decode()
        for _ in range(given.rounds):
            works["bf16"].append(bf16.decode())
            works["int8"].append(int8.decode())
    return works


def row(kv_dtype: str, num_sequences: int, works: list[Work]) -> list[str]:
    times = [work.elapsed_s for work in works]
    attention_s = median([work.attention_s for work in works])
    num_bytes = works[0].kv_bytes
    return [
        kv_dtype,
        f"{median(times) * 1e3:.1f} ms ({min(times) * 1e3:.1f} - {max(times) * 1e3:.1f})",
        f"{num_sequences / median(times):.0f}",
        f"{attention_s * 1e3:.1f} ms",
        f"{num_bytes / 1e6:.0f} MB",
        f"{num_bytes / attention_s / 1e9:.1f} GB/s",
    ]


if __name__ == "__main__":
    main()

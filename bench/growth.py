"""How cost grows on the native engine: with the number of requests, and with the length of the context.

Random prompts that share nothing, fixed output lengths. The time should grow with the requests as their tokens do, and
with the context as its arithmetic does: attention of a prompt grows with the square of its length, everything else with
the length. The last column is the time against that arithmetic; where it stays level, nothing else grows.

    python bench/growth.py [--model MODEL.gguf] [--dtype int8]
"""

from __future__ import annotations

import argparse
import time

import common
from peers import Workload

from blendserve import LLM, SamplingParams
from blendserve.config import DTYPES

KV_BYTES = 4 << 30
"""Holds all sequences at once: 8 x 8,192 tokens of the default model take 1.5 GB, of a 1B Llama 2.1 GB."""
REQUESTS = tuple(Workload("requests", count, 128, 32) for count in (16, 32, 64, 128, 256, 512))
CONTEXTS = tuple(Workload("context", 8, length, 8) for length in (256, 512, 1024, 2048, 4096, 8184))
"""The last one ends at 8,192 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="GGUF file; the default model if absent")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights (bf16)")
    parser.add_argument("--most", type=int, default=len(REQUESTS), help="sizes of each kind, for a quick look")
    arguments = parser.parse_args()
    common.print_header()
    # As many sequences at once as the largest job has: growth of the engine, not of its queue.
    most = REQUESTS[-1].num_requests
    with LLM(arguments.model, max_num_seqs=most, kv_memory_bytes=KV_BYTES, dtype=arguments.dtype) as llm:
        print(f"{llm.model.spec.name}, weights in {arguments.dtype}, at most {most} sequences at once\n", flush=True)
        for workloads in (REQUESTS[: arguments.most], CONTEXTS[: arguments.most]):
            seconds: list[list[float]] = [[] for _ in workloads]
            for repeat in range(arguments.repeats):
                for i, workload in enumerate(workloads):
                    seconds[i].append(_timed(llm, workload, repeat))
            print(_table(llm, workloads, seconds) + "\n", flush=True)


def _timed(llm: LLM, workload: Workload, repeat: int) -> float:
    prompts = workload.prompts(llm.model.spec.vocab_size, f"{workload} {repeat}")
    started_s = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=workload.output_tokens, temperature=0, ignore_eos=True))
    return time.perf_counter() - started_s


def _table(llm: LLM, workloads: tuple[Workload, ...], seconds: list[list[float]]) -> str:
    rows = []
    for workload, repeats in zip(workloads, seconds, strict=True):
        spent = common.summarise(repeats)
        flop = workload.flop(llm.model.spec)
        rows.append(
            [
                f"{workload.num_requests} x {workload.prompt_tokens} -> {workload.output_tokens}",
                str(workload.num_tokens),
                spent.text(2),
                f"{spent.median / workload.num_tokens * 1e3:.2f}",
                f"{flop / 1e9:.0f}",
                f"{spent.median / flop * 1e12:.2f}",
            ]
        )
    return common.table([workloads[0].name, "tokens", "seconds", "ms/token", "GFLOP", "ms/GFLOP"], rows)


if __name__ == "__main__":
    main()

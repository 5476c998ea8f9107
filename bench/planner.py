"""Time and memory of planning: tree, densities, sampling, order with splits, first scan. One process per size.

    python bench/planner.py                      # 100k, 200k, 400k prompts of 600 tokens
    python bench/planner.py --size 2000000x300   # needs 16 GB

Prompts are random tokens in 57 subtrees whose shared prefix is half of each prompt. CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field

import numpy as np

from blendserve.costs.model_cost import CostModel
from blendserve.planner.base import RequestTable
from blendserve.planner.lengths import LengthModel
from blendserve.planner.plan import make_plan
from blendserve.planner.scanner import DualScanner
from blendserve.planner.sorting import FlatPrompts, sort_prompts
from blendserve.planner.tree import PrefixTree

SIZES = ("100000x600", "200000x600", "400000x600")
NUM_SUBTREES = 57
COST = CostModel(token_s=57e-6, kv_token_s=8e-8)  # about Llama-3-8B on an A100
STAGES = ("sort", "tree", "lengths", "plan", "first scan")


@dataclass
class Stopwatch:
    """Seconds by stage: CPU time, which neighbours on the machine disturb least, and wall time."""

    cpu_s: dict[str, float] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)
    _cpu: float = field(default_factory=time.process_time)
    _wall: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        self.cpu_s[stage], self.wall_s[stage] = cpu - self._cpu, wall - self._wall
        self._cpu, self._wall = time.process_time(), time.perf_counter()


def random_prompts(num_requests: int, num_tokens: int, rng: np.random.Generator) -> FlatPrompts:
    """Prompts of about num_tokens tokens; the first half is that of their subtree."""
    lengths = rng.integers(int(0.75 * num_tokens), int(1.25 * num_tokens), num_requests)
    offsets = np.zeros(num_requests + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    token_ids = np.empty(int(offsets[-1]), dtype=np.int32)
    for begin in range(0, len(token_ids), 1 << 24):
        part = token_ids[begin : begin + (1 << 24)]
        part[:] = rng.integers(0, 32000, len(part), dtype=np.int32)
    stems = rng.integers(0, 32000, (NUM_SUBTREES, num_tokens // 2), dtype=np.int32)
    for start, subtree in zip(offsets[:-1].tolist(), rng.integers(0, NUM_SUBTREES, num_requests).tolist(), strict=True):
        token_ids[start : start + num_tokens // 2] = stems[subtree]
    return FlatPrompts(token_ids, offsets)


def measure(num_requests: int, num_tokens: int) -> dict[str, object]:
    """Plan one job in this process."""
    rng = np.random.default_rng(0)
    prompts = random_prompts(num_requests, num_tokens, rng)
    lengths = np.diff(prompts.offsets)
    known = np.where(rng.random(num_requests) < 0.5, rng.integers(1, 400, num_requests), -1)
    table = RequestTable(lengths, np.full(num_requests, 1024), known)
    gc.collect()
    watch = Stopwatch()
    ordered = sort_prompts(prompts)
    watch.lap("sort")
    tree = PrefixTree.from_sorted(*ordered)
    watch.lap("tree")
    model = LengthModel(tree, table)
    watch.lap("lengths")
    plan = make_plan(tree, table, COST, lengths=lambda _tree, _table: model)
    watch.lap("plan")
    scanner = DualScanner(plan.schedule.order, plan.samples)
    for number in range(1000):
        scanner.take(scanner.peek_memory_end() if number % 2 else scanner.peek_compute_end())
    watch.lap("first scan")
    return {
        "requests": num_requests,
        "tokens": num_tokens,
        "cpu_s": watch.cpu_s,
        "wall_s": watch.wall_s,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "prompts_gb": (prompts.token_ids.nbytes + prompts.offsets.nbytes) / 1e9,
        "splits": int(plan.schedule.leaf_order.is_split.sum()),
        "rounds": plan.schedule.leaf_order.num_rounds,
        "sharing": [round(plan.optimal_sharing, 4), round(plan.planned_sharing, 4)],
    }


def report(results: list[dict[str, object]]) -> None:
    print("| requests x tokens | " + " | ".join(STAGES) + " | total CPU s | wall s | peak RSS GB | of it prompts GB |")
    print("|---" * (len(STAGES) + 5) + "|")
    for result in results:
        cpu, wall = result["cpu_s"], result["wall_s"]
        assert isinstance(cpu, dict)
        assert isinstance(wall, dict)
        cells = [f"{cpu[stage]:.2f}" for stage in STAGES]
        cells += [f"{sum(cpu.values()):.2f}", f"{sum(wall.values()):.2f}"]
        cells += [f"{result['peak_rss_gb']:.2f}", f"{result['prompts_gb']:.2f}"]
        print(f"| {result['requests']:,} x {result['tokens']} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="REQUESTSxTOKENS; may be given more than once")
    parser.add_argument("--json", action="store_true", help="measure one size in this process and print JSON")
    arguments = parser.parse_args()
    sizes = arguments.size or list(SIZES)
    if arguments.json:
        num_requests, num_tokens = map(int, sizes[0].split("x"))
        print(json.dumps(measure(num_requests, num_tokens)))
        return
    results = []
    for size in sizes:
        command = [sys.executable, __file__, "--json", "--size", size]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout))
        print(json.dumps(results[-1]), file=sys.stderr)
    report(results)


if __name__ == "__main__":
    main()

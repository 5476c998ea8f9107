"""Scheduling cost per step of the engine loop, with an executor that costs nothing: `python bench/scheduler.py`.

Every running sequence decodes, finished ones are replaced at once, prompts share a system prefix. Prints processor
time per step (all of it scheduling), mean and P99, at one admission in two steps and at two admissions a step, under a
queue that costs nothing and under `blend` with all its forecasts. What it is a share of is the time of a native step:
`--step-ms` (a step of 256 decodes of the default model takes some hundred milliseconds on two cores).
"""

from __future__ import annotations

import argparse
import cProfile
import platform
import pstats
import time
from collections.abc import Hashable

import numpy as np

from blendserve.config import EngineConfig
from blendserve.costs.model_cost import CostModel
from blendserve.engine.fake import FakeSimulator, FifoPolicy
from blendserve.engine.loop import EngineLoop
from blendserve.engine.planned import PlannedRequests
from blendserve.planner.base import RequestTable
from blendserve.planner.plan import Plan, make_plan
from blendserve.planner.policies import make_policy
from blendserve.planner.tree import PrefixTree
from blendserve.request import Request, SamplingParams

PROMPT = np.ones(2048, np.int32)
BLOCK_SIZE = 16


class SyntheticSource:
    """Requests of about 600 prompt tokens, 64 of them shared by all, made on demand."""

    def __init__(self, num_requests: int, mean_output_tokens: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.num_prompt_tokens = generator.integers(100, 1100, num_requests)
        self.max_output_tokens = generator.integers(1, 2 * mean_output_tokens, num_requests)
        self._sampling = SamplingParams(max_tokens=None, ignore_eos=True)

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)

    def __getitem__(self, index: int, /) -> Request:
        num_tokens = int(self.num_prompt_tokens[index])
        own = range((index + 1) << 12, ((index + 1) << 12) + num_tokens // BLOCK_SIZE - 4)
        keys: tuple[Hashable, ...] = (0, 1, 2, 3, *own)
        num_output = int(self.max_output_tokens[index])
        return Request(index, PROMPT[:num_tokens], num_tokens, self._sampling, num_output, block_keys=keys)


class TokenSimulator(FakeSimulator):
    """Makes the loop handle tokens as for a real executor: all of them zero, none of them ends a sequence."""

    needs_tokens = True
    eos_token_ids: tuple[int, ...] = (2, 3)


class FrugalFifo(FifoPolicy):
    """Keeps 5% of the memory for growth, and knows that only the system prefix is used again."""

    def next(self, view: object) -> int | None:
        free, capacity = view.free_tokens, view.capacity_tokens  # type: ignore[attr-defined]
        return super().next(view) if free > capacity // 20 or capacity == free else None  # type: ignore[arg-type]

    def next_use(self, key: Hashable) -> float:
        return 0.0 if isinstance(key, int) and key < 4 else float("inf")


def blend_plan(source: SyntheticSource) -> Plan:
    """The plan of a source: all prompts share 64 tokens, lengths are not known but for their caps."""
    lengths = source.num_prompt_tokens
    shared = np.full(len(source), 64)
    shared[0] = 0
    tree = PrefixTree.from_sorted(np.arange(len(source)), shared, lengths)
    table = RequestTable(lengths, source.max_output_tokens, np.full(len(source), -1))
    return make_plan(tree, table, CostModel(token_s=1e-3, kv_token_s=1e-6))


def run(policy: str, num_running: int, num_steps: int, admissions_per_step: float, needs_tokens: bool) -> EngineLoop:
    """Run `num_steps` steps with `num_running` sequences, `admissions_per_step` of them replaced each step."""
    mean_output_tokens = int(num_running / admissions_per_step)
    source = SyntheticSource(int(num_steps * admissions_per_step) + 2 * num_running, mean_output_tokens, seed=0)
    num_blocks = num_running * (800 + mean_output_tokens) // BLOCK_SIZE
    max_model_len = 1100 + 2 * mean_output_tokens
    config = EngineConfig(max_num_seqs=num_running, max_num_batched_tokens=4096, max_model_len=max_model_len)
    executor = (TokenSimulator if needs_tokens else FakeSimulator)(num_blocks, BLOCK_SIZE)
    loop = EngineLoop(executor, config, clock=time.process_time)
    if policy == "blend":
        plan = blend_plan(source)
        loop.begin(PlannedRequests(source, plan.tree), make_policy(policy, plan))
    else:
        loop.begin(source, FrugalFifo(len(source)))
    while loop.has_work and loop.stats.num_steps < num_steps:
        loop.step()
    return loop


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--step-ms", type=float, default=100.0, help="time of a native step to compare with (100)")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    print(f"policy  running  tokens  admitted/step  steps  mean ms  P99 ms  of {arguments.step_ms:g} ms  preemptions")
    profiler = cProfile.Profile()
    for policy, num_running, needs_tokens, admissions in (
        ("queue", 256, True, 0.5),
        ("queue", 256, False, 0.5),
        ("queue", 256, False, 2.0),
        ("blend", 256, True, 0.5),
        ("blend", 256, True, 2.0),
        ("queue", 1000, False, 0.5),
        ("queue", 1000, False, 2.0),
        ("blend", 1000, False, 2.0),
    ):
        if arguments.profile:
            profiler.enable()
        stats = run(policy, num_running, arguments.steps, admissions, needs_tokens).stats
        profiler.disable()
        admitted = f"{stats.num_finished / stats.num_steps:13.2f}  {stats.num_steps:5d}"
        mean_ms, p99_ms = stats.mean_scheduling_s * 1e3, stats.p99_scheduling_s * 1e3
        share = f"{mean_ms / arguments.step_ms:{len(f'of {arguments.step_ms:g} ms')}.2%}"
        figures = f"{mean_ms:7.3f}  {p99_ms:6.3f}  {share}  {stats.num_preemptions:11d}"
        print(f"{policy:>6}  {num_running:7d}  {'yes' if needs_tokens else 'no':>6}  {admitted}  {figures}")
    if arguments.profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()

"""Scheduling cost per step of the engine loop, with an executor that costs nothing: `python bench/scheduler.py`.

Every running sequence decodes, finished ones are replaced at once, prompts share a system prefix. Prints processor
time per step (all of it scheduling) at one admission in two steps and at two admissions a step.
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
from blendserve.engine.fake import FakeSimulator, FifoPolicy
from blendserve.engine.loop import EngineLoop
from blendserve.request import Request, SamplingParams

PROMPT = np.ones(2048, np.int32)
BLOCK_SIZE = 16


class SyntheticSource:
    """Requests of about 600 prompt tokens, 64 of them shared by all, made on demand."""

    def __init__(self, num_requests: int, mean_output_tokens: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self._num_prompt_tokens = generator.integers(100, 1100, num_requests)
        self._max_output_tokens = generator.integers(1, 2 * mean_output_tokens, num_requests)
        self._sampling = SamplingParams(max_tokens=None, ignore_eos=True)

    def __len__(self) -> int:
        return len(self._num_prompt_tokens)

    def __getitem__(self, index: int, /) -> Request:
        num_tokens = int(self._num_prompt_tokens[index])
        own = range((index + 1) << 12, ((index + 1) << 12) + num_tokens // BLOCK_SIZE - 4)
        keys: tuple[Hashable, ...] = (0, 1, 2, 3, *own)
        num_output = int(self._max_output_tokens[index])
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


def run(num_running: int, num_steps: int, admissions_per_step: float, needs_tokens: bool) -> EngineLoop:
    """Run `num_steps` steps with `num_running` sequences, `admissions_per_step` of them replaced each step."""
    mean_output_tokens = int(num_running / admissions_per_step)
    source = SyntheticSource(int(num_steps * admissions_per_step) + 2 * num_running, mean_output_tokens, seed=0)
    num_blocks = num_running * (800 + mean_output_tokens) // BLOCK_SIZE
    max_model_len = 1100 + 2 * mean_output_tokens
    config = EngineConfig(max_num_seqs=num_running, max_num_batched_tokens=4096, max_model_len=max_model_len)
    loop = EngineLoop((TokenSimulator if needs_tokens else FakeSimulator)(num_blocks, BLOCK_SIZE), config)
    loop.begin(source, FrugalFifo(len(source)))
    while loop.has_work and loop.stats.num_steps < num_steps:
        loop.step()
    return loop


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    print("running  tokens  admitted/step  steps  cpu-ms/step  steps/cpu-s  preemptions")
    profiler = cProfile.Profile()
    for num_running, needs_tokens, admissions in (
        (256, True, 0.5),
        (256, False, 0.5),
        (256, False, 2.0),
        (1000, False, 0.5),
        (1000, False, 2.0),
    ):
        if arguments.profile:
            profiler.enable()
        began = time.process_time()
        loop = run(num_running, arguments.steps, admissions, needs_tokens)
        elapsed = time.process_time() - began
        profiler.disable()
        stats = loop.stats
        rate = f"{elapsed / stats.num_steps * 1e3:11.3f}  {stats.num_steps / elapsed:11.0f}"
        admitted = f"{stats.num_finished / stats.num_steps:13.2f}  {stats.num_steps:5d}"
        tokens = "yes" if needs_tokens else "no"
        print(f"{num_running:7d}  {tokens:>6}  {admitted}  {rate}  {stats.num_preemptions:11d}")
    if arguments.profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()

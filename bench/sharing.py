"""Prefix sharing that each policy reaches on real prompts: `python bench/sharing.py --questions PATH`.

Few-shot questions (MMLU, five solved ones a subject) among long generations, through the engine's own loop, batcher and
prefix cache under a small KV memory; nothing is computed, since what is shared does not depend on the tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import common
import mixes
import numpy as np
from scheduler import TokenSimulator

from blendserve.config import BLOCK_SIZE, EngineConfig
from blendserve.costs.model_cost import CostModel
from blendserve.engine.loop import EngineLoop
from blendserve.engine.planned import PlannedRequests, plan_requests
from blendserve.planner.base import RequestTable
from blendserve.planner.plan import Plan
from blendserve.planner.policies import POLICY_NAMES, make_policy
from blendserve.planner.sorting import flatten
from blendserve.request import Request, SamplingParams, TokenIds

# SmolLM2-135M on two cores with 256-bit vectors, as `blendserve run` plans without a calibration.
COST = CostModel(token_s=2 * 134.5e6 / 180e9, kv_token_s=23_040 / 24e9)
SAMPLING = SamplingParams(max_tokens=None, ignore_eos=True)


def computed_tokens(plan: Plan, prompts: Sequence[TokenIds], policy: str, capacity_tokens: int) -> tuple[int, int]:
    """Prompt tokens that one run computes, and its preemptions (whose tokens count too)."""
    outputs = plan.table.max_output_tokens.tolist()
    requests = [
        Request(index, prompt, len(prompt), SAMPLING, outputs[index], index) for index, prompt in enumerate(prompts)
    ]
    config = EngineConfig(max_num_seqs=256, max_num_batched_tokens=512, max_model_len=8192)
    loop = EngineLoop(TokenSimulator(capacity_tokens // BLOCK_SIZE, BLOCK_SIZE), config)
    outputs_of_run = list(loop.run(PlannedRequests(requests, plan.tree), make_policy(policy, plan)))
    assert all(output.error is None for output in outputs_of_run)
    return loop.stats.num_prefill_tokens, loop.stats.num_preemptions


def main() -> None:
    """Print a row per policy, a column per size of the KV memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="MMLU questions, one JSON object a line")
    parser.add_argument("--mix", default="all", choices=[mix.name for mix in mixes.MIXES])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--kv-tokens", type=int, nargs="+", default=[8_000, 16_000, 32_000])
    parser.add_argument("--policies", nargs="+", default=POLICY_NAMES, choices=POLICY_NAMES)
    arguments = parser.parse_args()
    common.print_header()
    mix = next(mix for mix in mixes.MIXES if mix.name == arguments.mix).scaled(arguments.scale)
    lines = mixes.build(mix, arguments.questions)
    prompts = mixes.encode(lines)
    lengths = np.array([len(prompt) for prompt in prompts])
    outputs = np.array([line.output_tokens for line in lines])
    plan = plan_requests(flatten(prompts), RequestTable(lengths, outputs, outputs), COST)
    most = plan.tree.sharing
    print(f"{mixes.title(mix, lines, prompts)}; a depth-first walk with an endless cache shares {most:.3f}\n")
    rows = []
    for policy in arguments.policies:
        row = [policy]
        for capacity in arguments.kv_tokens:
            computed, preemptions = computed_tokens(plan, prompts, policy, capacity)
            share = (1 - computed / lengths.sum()) / most
            row.append(f"{share:.1%}" + (f" ({preemptions} preempted)" if preemptions else ""))
        rows.append(row)
    print(common.table(["of the most", *(f"KV of {capacity:,} tokens" for capacity in arguments.kv_tokens)], rows))


if __name__ == "__main__":
    main()

"""How much KV memory the memory end leaves to the compute end."""

from __future__ import annotations

from blendserve.planner.base import Int64s
from blendserve.planner.plan import Plan
from blendserve.planner.schedule import Schedule


def compute_end_reserve(
    plan: Plan, schedule: Schedule, upcoming: Int64s, *, present_tokens: float, budget: int
) -> float:
    """KV tokens for the compute end, of which `upcoming` requests are next.

    It needs room for the largest of their prompts, or that one could never enter. On an engine that overlaps, it also
    needs what it holds now (`present_tokens`), or what it will hold at `budget` prefill tokens in every step. Without
    overlap no step is better for a steady supply of prefill, and memory that waits for it makes more steps.
    """
    next_prompt_tokens = float(plan.table.num_prompt_tokens[upcoming].max(initial=0))
    if not plan.cost.has_overlap:
        return next_prompt_tokens
    return max(present_tokens, steady_tokens(plan, schedule, upcoming, budget)) + next_prompt_tokens


def steady_tokens(plan: Plan, schedule: Schedule, upcoming: Int64s, budget: int) -> float:
    """KV tokens that requests like these hold when every step computes `budget` tokens of them (Little's law)."""
    if not len(upcoming):
        return 0.0
    cost = plan.cost
    expected = schedule.expected_output_tokens[upcoming]
    decodes_s = cost.decode_s * float(expected.sum())
    prefill = (float(schedule.compute_s[upcoming].sum()) - decodes_s) / cost.token_s
    token_steps = float(schedule.memory_s[upcoming].sum()) / cost.kv_token_s
    return budget * token_steps / max(prefill, 1.0)

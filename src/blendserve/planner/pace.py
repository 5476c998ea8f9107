"""How many prefill tokens a step gets: an even share of the compute that remains, over the steps that there will be."""

from __future__ import annotations

from typing import NamedTuple

from blendserve.costs.model_cost import CostModel

MAX_PREFILL_STEPS = 16
"""What is admitted holds memory: its prefill takes about this many steps at most, and no more than needed once nothing
waits."""
EVEN_SHARE = 0.5
"""Part of a full step's memory time that every step counts for when compute is shared out, however little it reads."""


class RestOfJob(NamedTuple):
    """What is left to do. `num_idle_steps`: steps that there will be anyway, because something that runs is longer than
    all that waits. `has_waiting`: does any request wait?"""

    compute_s: float
    memory_s: float
    num_idle_steps: float
    has_waiting: bool


class RunningLoad(NamedTuple):
    """What runs: KV tokens that the decodes of the next step read, their number, and prompt tokens yet to compute."""

    num_kv_tokens: float
    num_decodes: int
    num_pending_tokens: int


def prefill_budget(
    cost: CostModel, rest: RestOfJob, load: RunningLoad, *, full_kv_tokens: float, max_num_batched_tokens: int
) -> int:
    """Prefill tokens of a step with this load. `full_kv_tokens`: KV tokens of an engine whose memory is full."""
    tokens = rest.compute_s / cost.token_s * step_share(cost, rest, load.num_kv_tokens, full_kv_tokens)
    urgent = load.num_pending_tokens / (MAX_PREFILL_STEPS if rest.has_waiting else 1)
    wanted = max(tokens - load.num_decodes * cost.decode_s / cost.token_s, urgent)
    return int(min(max(wanted, 1.0), max_num_batched_tokens))


def step_share(cost: CostModel, rest: RestOfJob, num_kv_tokens: float, full_kv_tokens: float) -> float:
    """Which part of the remaining compute belongs into a step that reads `num_kv_tokens`.

    The share follows the memory time of the step, which keeps compute for the memory to come. Every step counts for
    `EVEN_SHARE` of a full one besides, which wastes no step while memory fills up. Without overlap the mix does not
    matter, and steps share the compute only with those that there will be anyway.
    """
    if not cost.has_overlap:
        return 1.0 / max(rest.num_idle_steps, 1.0)
    full_s = full_kv_tokens * cost.kv_token_s
    even_s = EVEN_SHARE * full_s
    remaining_s = rest.memory_s + even_s * num_steps_left(rest, full_s)
    return min(1.0, (cost.kv_token_s * num_kv_tokens + even_s) / max(remaining_s, 1e-12))


def num_steps_left(rest: RestOfJob, full_s: float) -> float:
    """Steps over which to spread the compute: those that read all KV at full memory (`full_s` each), or those that the
    longest running request is expected to take; what waits must start early enough to end with it."""
    return max(rest.memory_s / full_s, rest.num_idle_steps, 1.0)

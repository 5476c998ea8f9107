"""How fast a job could run at best: the paper's practical optimum T_o and a lower bound T_lb on every schedule.

Both use the interference f(c, m) of the engine. f is convex and homogeneous, so the sum of f(c_t, m_t) over any steps
is at least f(sum c_t, sum m_t). T_o ignores what steps cost by themselves. T_lb counts it: a step reads at most a full
KV pool, so there are at least S = M / (time to read a full pool) steps of a constant a each, and T >= f(C + a S, M).
Nor can a job end before its longest request, alone on the machine, would.

On several replicas long requests cost more: whoever holds one takes at least as many steps as it has tokens, each with
its constant (`replicas_bound_s`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from blendserve.costs.model_cost import Floats, Lengths
from blendserve.costs.step_cost import Interference, StepCost


@dataclass(frozen=True, slots=True)
class Bounds:
    """Least resource seconds of a job and what follows for its time.

    `compute_s`: every token that is not shared, once, without step constants. `memory_s`: the KV that all decodes read.
    `longest_s`: the longest request alone.
    """

    compute_s: float
    memory_s: float
    num_steps: float
    longest_s: float
    optimum_s: float
    lower_bound_s: float


def job_bounds(
    num_prompt_tokens: Lengths,
    num_output_tokens: Lengths,
    num_shared_tokens: Lengths,
    cost: StepCost,
    capacity_tokens: float,
    interference: Interference | None = None,
    num_replicas: int = 1,
) -> Bounds:
    """Bounds of a job cut evenly. The first output token comes with the prefill: d outputs take d - 1 decodes.

    Shapes: lengths are aligned, [num_requests], in depth-first order: each request shares with the one before it.
    `interference` defaults to the engine's own; pass an overlapping one to hold a sequential engine against it.
    """
    prompts, outputs, shared = (
        np.asarray(lengths, dtype=np.float64) for lengths in (num_prompt_tokens, num_output_tokens, num_shared_tokens)
    )
    decodes = np.maximum(outputs - 1, 0)
    num_read = decodes * (prompts + (decodes + 1) / 2)
    if cost.shared_kv_share < 1:  # at best every decode runs beside the neighbour with which it shares more
        num_read -= (1 - cost.shared_kv_share) * decodes * np.maximum(shared, np.append(shared[1:], 0.0))
    compute_s = cost.token_s * float(np.sum(prompts + decodes - shared))
    compute_s += cost.head_s * float(np.sum(outputs))
    compute_s += cost.pair_s * float(np.sum(prompts * prompts - shared * shared)) / 2
    memory_s = cost.memory_s(float(np.sum(num_read)))
    num_steps = memory_s / cost.memory_s(capacity_tokens)
    effective = interference or cost.interference
    floor_s = cost.weight_floor_s + cost.head_floor_s
    longest_s = np.max(effective.steps_s(floor_s * decodes, cost.kv_token_s * num_read), initial=0.0)
    lower_s = effective.step_s(compute_s + cost.constant_s * num_steps, memory_s)
    if num_replicas > 1:
        lower_s = num_replicas * replicas_bound_s(
            decodes,
            cost.kv_token_s * num_read,
            num_replicas,
            lambda steps: effective.step_s(compute_s + cost.constant_s * max(steps, num_steps), memory_s),
        )
    return Bounds(
        compute_s=compute_s,
        memory_s=memory_s,
        num_steps=num_steps,
        longest_s=float(longest_s),
        optimum_s=effective.step_s(compute_s, memory_s) / num_replicas,
        lower_bound_s=max(lower_s / num_replicas, float(longest_s)),
    )


def replicas_bound_s(
    num_decodes: Floats, memory_s: Floats, num_replicas: int, total_s: Callable[[float], float]
) -> float:
    """The least T that n replicas could end in. Shapes: aligned, [num_requests]: decode steps and memory time of each.

    `total_s`: time of the whole job where all replicas together take that many steps. A replica reads for T at most, so
    any j of them can hold no more than the longest requests whose reads add up to j T. One of the first requests
    beyond those is elsewhere, and its replica takes as many steps as it has tokens. More time allows fewer steps, so
    the least T that suffices is found by halving.
    """
    longest = np.argsort(-num_decodes, kind="stable")
    decodes, reads = num_decodes[longest], np.cumsum(memory_s[longest])

    def is_enough(time_s: float) -> bool:
        beyond = np.searchsorted(reads, time_s * np.arange(num_replicas), side="right")
        return num_replicas * time_s >= total_s(float(decodes[beyond[beyond < len(decodes)]].sum()))

    low, high = 0.0, 1.0
    while not is_enough(high):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high

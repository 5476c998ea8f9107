"""Where the time of a simulated run went beyond its lower bound, in parts that add up.

The bound is T_lb = f(C + a S, M), and f(c, m) is the larger of two planes. Against the plane g that holds at the bound,
the time of every step is g of its tokens, g of its constant, and what its own mix of the two resources lacks. So
T - T_lb is a sum over steps, and falls into the begin of the run, its middle and its end.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from blendserve.costs.model_cost import Floats
from blendserve.costs.step_cost import Interference, StepCost
from blendserve.simulator.bounds import Bounds

FULL_SHARE = 0.9
"""The KV memory counts as full from this share of its highest load on: before is the begin, after it the end."""
PHASES = ("begin", "middle", "end")
LOSSES = ("again", *(f"{phase}_{what}" for phase in PHASES for what in ("steps", "mix")))
"""`again`: tokens that are computed although sharing could have spared them. `steps`: constants of more steps than a
full memory needs. `mix`: steps that have too much of one resource for the other."""


def losses_s(
    steps: Mapping[str, Floats], bounds: Bounds, cost: StepCost, capacity_tokens: float, overlap: Interference
) -> dict[str, float]:
    """Seconds by name, of `LOSSES`; they sum to the run's time less `bounds.lower_bound_s`.

    Shapes: `steps` are the columns of a step log, [num_steps]. `overlap` is the interference that the bound uses.
    """
    compute_weight, memory_weight = _plane(overlap, bounds.compute_s + cost.constant_s * bounds.num_steps, bounds)
    tokens_s = cost.token_s * (steps["num_prefill_tokens"] + steps["num_decode_tokens"])
    due_s = cost.constant_s * steps["memory_s"] / cost.memory_s(capacity_tokens)
    constants = compute_weight * (steps["compute_s"] - tokens_s - due_s)
    mix = steps["elapsed_s"] - compute_weight * steps["compute_s"] - memory_weight * steps["memory_s"]
    more_memory_s = float(steps["memory_s"].sum()) - bounds.memory_s
    more_due_s = cost.constant_s * more_memory_s / cost.memory_s(capacity_tokens)
    losses = {
        "again": compute_weight * (float(tokens_s.sum()) - bounds.compute_s + more_due_s)
        + memory_weight * more_memory_s
    }
    for phase, part in zip(PHASES, _phases(steps["num_kv_tokens"]), strict=True):
        losses[f"{phase}_steps"] = float(constants[part].sum())
        losses[f"{phase}_mix"] = float(mix[part].sum())
    return losses


def _plane(overlap: Interference, compute_s: float, bounds: Bounds) -> tuple[float, float]:
    """Weights of compute and memory in the larger part of f at the bound."""
    a, b = overlap.compute_delay, overlap.memory_delay
    is_compute_bound = compute_s + a * bounds.memory_s >= bounds.memory_s + b * compute_s
    return (1.0, a) if is_compute_bound else (b, 1.0)


def _phases(num_kv_tokens: Floats) -> tuple[slice, slice, slice]:
    full = np.flatnonzero(num_kv_tokens >= FULL_SHARE * num_kv_tokens.max(initial=0.0))
    first, last = (int(full[0]), int(full[-1]) + 1) if len(full) else (0, 0)
    return slice(0, first), slice(first, last), slice(last, None)

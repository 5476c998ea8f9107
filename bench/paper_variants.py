"""One assumption of the simulation changed at a time, to see which figures hang on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from blendserve.costs.step_cost import NANOFLOW, PERFECT, Interference
from blendserve.planner.base import Policy
from blendserve.simulator.machine import Machine


@dataclass(frozen=True, slots=True)
class Variant:
    """What changes in the machine and in the policy."""

    machine: Callable[[Machine], Machine] = lambda machine: machine
    policy: Callable[[Policy], Policy] = lambda policy: policy


def _memory(factor: float) -> Variant:
    return Variant(lambda machine: replace(machine, capacity_tokens=int(machine.capacity_tokens * factor)))


def _constant(factor: float) -> Variant:
    def change(machine: Machine) -> Machine:
        return replace(machine, cost=replace(machine.cost, constant_s=machine.cost.constant_s * factor))

    return Variant(change)


def _overlap(interference: Interference) -> Variant:
    """Engines that overlap do it so; sequential ones stay as they are. The bound assumes the same."""

    def change(machine: Machine) -> Machine:
        is_overlapped = machine.cost.interference == NANOFLOW
        cost = replace(machine.cost, interference=interference) if is_overlapped else machine.cost
        return replace(machine, cost=cost, overlap=interference)

    return Variant(change)


def _batch(num_tokens: int) -> Variant:
    """As many sequences as tokens at most: every decode is a token of the batch."""

    def change(machine: Machine) -> Machine:
        return replace(machine, max_num_batched_tokens=num_tokens, max_num_seqs=min(machine.max_num_seqs, num_tokens))

    return Variant(change)


def _with_next_use(next_use: Callable[[Hashable], float]) -> Variant:
    def change(policy: Policy) -> Policy:
        vars(policy)["next_use"] = next_use
        return policy

    return Variant(policy=change)


VARIANTS: dict[str, Variant] = {
    "KV memory x 0.5": _memory(0.5),
    "KV memory x 0.1": _memory(0.1),
    "KV memory x 2": _memory(2.0),
    "least recently used is evicted": _with_next_use(lambda _: 0.0),
    "prefixes are kept only while in use": _with_next_use(lambda _: math.inf),
    "step constant x 0": _constant(0.0),
    "step constant x 2": _constant(2.0),
    "perfect overlap, max(c, m)": _overlap(PERFECT),
    "weaker overlap, P(0.4) = 0.6": _overlap(Interference(2 / 3, 2 / 3)),
    "batch of 512 tokens": _batch(512),
    "batch of 4096 tokens": _batch(4096),
}

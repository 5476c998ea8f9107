"""Dumb twins: slow, obvious versions of what the package does with arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blendserve.costs.model_cost import CostModel

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class NodeTotals:
    """What one subtree holds, found by walking all requests token by token."""

    num_requests: int
    compute_s: float
    memory_s: float
    saved_s: float


def shared_prefix(first: Prompt, second: Prompt) -> int:
    """Leading tokens that two prompts have in common."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def unique_tokens(prompts: Sequence[Prompt]) -> int:
    """Distinct non-empty prefixes: the tokens that a walk with an endless cache computes."""
    return len({prompt[: length + 1] for prompt in prompts for length in range(len(prompt))})


def walk_tokens(prompts: Sequence[Prompt]) -> int:
    """Tokens computed by a walk whose cache holds nothing but the prompt before."""
    total = 0
    before: Prompt = ()
    for prompt in prompts:
        total += len(prompt) - shared_prefix(prompt, before)
        before = prompt
    return total


def subtree_prefixes(prompts: Sequence[Prompt]) -> set[Prompt]:
    """Prefixes at which the trie has a node: the root, whatever two distinct prompts share, and every prompt."""
    distinct = sorted(set(prompts))
    nodes: set[Prompt] = {()}
    for index, prompt in enumerate(distinct):
        for other in distinct[index + 1 :]:
            nodes.add(prompt[: shared_prefix(prompt, other)])
    return nodes


def node_totals(
    prompts: Sequence[Prompt], outputs: Sequence[float], cost: CostModel, members: Sequence[int]
) -> NodeTotals:
    """Costs of the requests `members`, every shared token saved but once."""
    compute = sum(float(cost.compute_s(len(prompts[member]), outputs[member])) for member in members)
    memory = sum(float(cost.memory_s(len(prompts[member]), outputs[member])) for member in members)
    seen: set[Prompt] = set()
    saved = 0.0
    for member in members:
        for length in range(1, len(prompts[member]) + 1):
            prefix = prompts[member][:length]
            if prefix in seen:
                saved += float(cost.prefix_compute_s(length)) - float(cost.prefix_compute_s(length - 1))
            seen.add(prefix)
    return NodeTotals(len(members), compute, memory, saved)


def kv_loads(held: Sequence[int], remaining: Sequence[int]) -> list[int]:
    """KV tokens at every step to come, when every sequence grows by one token a step until it ends."""
    return [
        sum(tokens + step for tokens, left in zip(held, remaining, strict=True) if left >= step)
        for step in range(max(remaining, default=0) + 1)
    ]

"""The policies by name. A policy is alive for one run: make a new one for every run of a plan."""

from __future__ import annotations

from collections.abc import Callable

from blendserve.errors import ConfigError
from blendserve.planner.base import Int64s, Policy
from blendserve.planner.blend import BlendPolicy
from blendserve.planner.paper import PaperPolicy
from blendserve.planner.plan import Plan
from blendserve.planner.static import StaticPolicy, bucket_order, fcfs_order, longest_first_order, random_order

_ORDER_BY_NAME: dict[str, Callable[[Plan], Int64s]] = {
    "fcfs": lambda plan: fcfs_order(plan.num_requests),
    "random": lambda plan: random_order(plan.num_requests, plan.seed),
    "dfs": lambda plan: plan.tree.order,
    "longest-first": lambda plan: longest_first_order(plan.expected_output_tokens),
    "lexical-buckets": lambda plan: bucket_order(plan.prompt_tree),
}
_POLICY_BY_NAME: dict[str, Callable[[Plan], Policy]] = {
    "blend": BlendPolicy,
    "paper": PaperPolicy,
}

POLICY_NAMES = (*_POLICY_BY_NAME, *_ORDER_BY_NAME)


def make_policy(name: str, plan: Plan) -> Policy:
    """Build a policy for one run. Raises: ConfigError when the name is unknown."""
    if name in _POLICY_BY_NAME:
        return _POLICY_BY_NAME[name](plan)
    if name in _ORDER_BY_NAME:
        return StaticPolicy(name, _ORDER_BY_NAME[name](plan))
    raise ConfigError(f"unknown policy {name!r}; known: {', '.join(POLICY_NAMES)}")

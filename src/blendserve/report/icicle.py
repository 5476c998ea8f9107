"""The prefix tree as a picture: every rectangle is a shared prefix, as wide as its requests have prompt tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.aggregates import leaf_costs, node_costs
from blendserve.planner.plan import Plan
from blendserve.planner.sorting import FlatPrompts
from blendserve.report.format import format_count, format_number
from blendserve.report.html import Html
from blendserve.report.svg import Axis, Chart
from blendserve.simulator.plan_summary import Decode, SharedPrefix, describe_node

MAX_LEVELS = 7
MAX_RECTANGLES = 800
_MIN_SHARE = 0.0015
_MAX_LABELLED = 60
_WIDTH = 1280
_ROW_HEIGHT = 30
_MIN_LABEL_PIXELS = 70
_CHARACTER_PIXELS = 6.8


def icicle(plan: Plan, prompts: FlatPrompts, decode: Decode) -> Html:
    """Top levels of the tree in the planned order, compute end left; what is narrower than a pixel or two is left out.

    Prompts split off their subtree stand at the first level, where the order has them.
    """
    density = _node_density(plan)
    left, right, level = _places(plan)
    nodes = _widest(right - left, level)
    num_levels = int(level[nodes].max(initial=1))
    axes = _axes(num_levels)
    chart = Chart(*axes, label="prefix tree", size=(_WIDTH, 66 + _ROW_HEIGHT * num_levels))
    described = [(int(node), describe_node(plan, prompts, decode, int(node))) for node in nodes]
    for node, prefix in described:
        row = num_levels - int(level[node])
        style, opacity = density_dress(float(density[node]))
        title = _title(prefix, float(density[node]))
        chart.block((left[node] * 100, right[node] * 100), (row, row + 0.94), style, opacity, title)
    for node, prefix in _labelled(described, right - left):
        text = _fitted(prefix.text, float(right[node] - left[node]) * (_WIDTH - 70))
        chart.text(float(left[node]) * 100, num_levels - int(level[node]) + 0.45, text)
    return chart.render()


def density_dress(density: float) -> tuple[str, float]:
    """Colour and strength for a density: which resource, and how far from balance."""
    strength = min(1.0, abs(math.log10(density)) / 1.5) if 0 < density < math.inf else 1.0
    return ("compute" if density >= 1 else "memory"), 0.15 + 0.5 * strength


def _node_density(plan: Plan) -> NDArray[np.float64]:
    prompts, outputs = plan.table.num_prompt_tokens, plan.expected_output_tokens
    leaves = leaf_costs(plan.tree, plan.cost, plan.cost.compute_s(prompts, outputs), plan.schedule.memory_s)
    return node_costs(plan.tree, plan.cost, leaves, ~plan.schedule.leaf_order.is_split).density


def _places(plan: Plan) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Where every node begins and ends, as shares of all prompt tokens, and its level."""
    order = plan.schedule.order
    tokens = np.concatenate(([0], np.cumsum(plan.table.num_prompt_tokens[order])))
    share = tokens / max(1, tokens[-1])
    level = plan.tree.level.copy()
    level[plan.tree.num_inner :][plan.schedule.leaf_order.is_split] = 1
    return share[plan.schedule.first_position], share[plan.schedule.last_position], level


def _widest(width: NDArray[np.float64], level: NDArray[np.int64]) -> NDArray[np.int64]:
    shown = np.flatnonzero((width >= _MIN_SHARE) & (level >= 1) & (level <= MAX_LEVELS))
    return shown[np.argsort(-width[shown], kind="stable")[:MAX_RECTANGLES]]


def _axes(num_levels: int) -> tuple[Axis, Axis]:
    across = Axis("prompt tokens in the planned order, %: compute end left, memory end right", 0, 100)
    return across, Axis("", 0, num_levels, format=lambda _: "")


def _labelled(
    described: Sequence[tuple[int, SharedPrefix]], width: NDArray[np.float64]
) -> Sequence[tuple[int, SharedPrefix]]:
    wide = [entry for entry in described if width[entry[0]] * (_WIDTH - 70) >= _MIN_LABEL_PIXELS]
    return wide[:_MAX_LABELLED]


def _fitted(text: str, pixels: float) -> str:
    room = int((pixels - 8) / _CHARACTER_PIXELS)
    return text if len(text) <= room else text[: max(1, room - 1)] + "…"


def _title(prefix: SharedPrefix, density: float) -> str:
    kind = "identical prompts" if prefix.is_whole_prompt and prefix.num_requests > 1 else "prefix"
    if prefix.num_requests == 1:
        kind = "one prompt"
    return (
        f"{kind} of {format_count(prefix.num_prefix_tokens)} tokens, {format_count(prefix.num_requests)} requests, "
        f"saves {format_count(prefix.num_saved_tokens)} tokens, density {format_number(density)}: {prefix.text}"
    )

"""Everything known of a job before it runs, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blendserve.cost import CostModel, Floats
from blendserve.planner.base import RequestTable
from blendserve.planner.tree import PrefixTree


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy starts from. Shapes: `expected_output_tokens` float64[num_requests]."""

    tree: PrefixTree
    table: RequestTable
    cost: CostModel
    expected_output_tokens: Floats
    seed: int = 0

    @property
    def num_requests(self) -> int:
        return len(self.table)


def make_plan(tree: PrefixTree, table: RequestTable, cost: CostModel, *, seed: int = 0) -> Plan:
    """Plan a job whose prompts are sorted."""
    known = table.known_output_tokens
    expected = np.where(known >= 0, known, table.max_output_tokens).astype(np.float64)
    return Plan(tree=tree, table=table, cost=cost, expected_output_tokens=expected, seed=seed)

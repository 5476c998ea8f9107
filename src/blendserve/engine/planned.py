"""Requests run by a plan: all at once, or window by window as they arrive."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

from blendserve.config import BLOCK_SIZE
from blendserve.costs.model_cost import CostModel
from blendserve.engine.front import Front
from blendserve.engine.loop import EngineLoop
from blendserve.planner.base import RequestTable
from blendserve.planner.plan import Plan, make_plan
from blendserve.planner.policies import make_policy
from blendserve.planner.sorting import FlatPrompts
from blendserve.planner.tree import PrefixTree
from blendserve.planner.windows import Window, WindowedPolicy
from blendserve.request import Request, RequestSource, SequenceOutput


@dataclass(frozen=True, slots=True)
class PlannedRequests:
    """A source whose requests carry the plan's block keys, by which prefixes are shared and evicted."""

    source: RequestSource
    tree: PrefixTree

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Request:
        return replace(self.source[index], block_keys=self.tree.block_keys(index, BLOCK_SIZE))


def plan_requests(prompts: FlatPrompts, table: RequestTable, cost: CostModel, *, seed: int = 0) -> Plan:
    """Sort the prompts into a tree and plan them. Shapes: row i of `table` is prompt i."""
    return make_plan(PrefixTree.from_flat(prompts), table, cost, seed=seed)


def run_planned(
    engine: EngineLoop, source: RequestSource, plan: Plan, policy: str, front: Front | None = None
) -> Iterator[SequenceOutput]:
    """Run every request of `source` under a policy, yielding outputs as they finish. Requests of `front` go ahead."""
    planned, chosen = PlannedRequests(source, plan.tree), make_policy(policy, plan)
    return engine.run(planned, chosen) if front is None else front.run(engine, planned, chosen)


def run_windowed(
    engine: EngineLoop,
    source: RequestSource,
    windows: Iterator[Window],
    cost: CostModel,
    policy: str,
    front: Front | None = None,
) -> Generator[SequenceOutput]:
    """Run requests that arrive in windows, each planned together with what still waits when little does.

    `source` has the requests of all windows taken so far; their block keys name contents.
    """
    windowed = WindowedPolicy(windows, cost, lambda plan: make_policy(policy, plan))
    yield from engine.run(source, windowed) if front is None else front.run(engine, source, windowed)

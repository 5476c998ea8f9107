"""Everything known of a job before it runs, as one frozen value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from blendserve.config import BLOCK_SIZE
from blendserve.costs.model_cost import CostModel, Floats
from blendserve.planner.base import Int64s, RequestTable
from blendserve.planner.lengths import DEFAULT_SAMPLE_RATE, LengthModel, Lengths
from blendserve.planner.order import DEFAULT_KEPT_SHARING
from blendserve.planner.schedule import Schedule, make_schedule
from blendserve.planner.tree import PrefixTree

LengthsFactory = Callable[[PrefixTree, RequestTable], Lengths]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy starts from. `tree` shares whole KV blocks, as engines do (of a repeated prompt, all of it),
    `prompt_tree` every token. `schedule` holds for the estimates before anything has run; a policy that learns
    makes its own lengths with `new_lengths` and its own schedules from them.
    """

    tree: PrefixTree
    prompt_tree: PrefixTree
    table: RequestTable
    cost: CostModel
    schedule: Schedule
    samples: Int64s
    new_lengths: Callable[[], Lengths]
    kept_sharing: float = DEFAULT_KEPT_SHARING
    seed: int = 0

    @property
    def num_requests(self) -> int:
        return len(self.table)

    @property
    def expected_output_tokens(self) -> Floats:
        """float64[num_requests]."""
        return self.schedule.expected_output_tokens

    @property
    def optimal_sharing(self) -> float:
        """Share of prompt tokens that a depth-first walk finds, in full blocks or as a whole prompt."""
        return self.tree.sharing

    @property
    def planned_sharing(self) -> float:
        """The same after conditional splits."""
        return self.schedule.leaf_order.sharing(self.tree)

    @property
    def root_density(self) -> float:
        """Compute over memory time of the whole job, every shared token computed once."""
        return self.schedule.root_density

    def reschedule(self, lengths: Lengths) -> Schedule:
        """Order all requests anew by other estimates. Mutates nothing."""
        return make_schedule(self.tree, self.table, self.cost, lengths, kept_sharing=self.kept_sharing)


def make_plan(
    tree: PrefixTree,
    table: RequestTable,
    cost: CostModel,
    *,
    seed: int = 0,
    sample_rate: float = DEFAULT_SAMPLE_RATE,
    kept_sharing: float = DEFAULT_KEPT_SHARING,
    lengths: LengthsFactory | None = None,
    block_size: int = BLOCK_SIZE,
) -> Plan:
    """Plan a job. `lengths` makes a model of output lengths other than `LengthModel` (the paper's means, an oracle); it
    gets `tree` as it is: prompts that begin alike for less than a block have something in common all the same."""

    def new_lengths() -> Lengths:
        if lengths is not None:
            return lengths(tree, table)
        return LengthModel(tree, table, sample_rate=sample_rate, seed=seed)

    model = new_lengths()
    blocks = tree.in_blocks(block_size)
    return Plan(
        tree=blocks,
        prompt_tree=tree,
        table=table,
        cost=cost,
        schedule=make_schedule(blocks, table, cost, model, kept_sharing=kept_sharing),
        samples=model.samples,
        new_lengths=new_lengths,
        kept_sharing=kept_sharing,
        seed=seed,
    )

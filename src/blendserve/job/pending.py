"""The requests that a job has yet to answer, and their plan."""

from __future__ import annotations

import numpy as np

from blendserve.config import BLOCK_SIZE
from blendserve.costs.model_cost import CostModel
from blendserve.errors import RequestError
from blendserve.job.store import TokenStore
from blendserve.planner.base import Int64s, RequestTable
from blendserve.planner.plan import Plan, make_plan
from blendserve.planner.sorting import FlatPrompts
from blendserve.planner.tree import PrefixTree
from blendserve.request import Request

WITHDRAWN = "withdrawn"
"""The code of the error that ends a request which nobody wants any more."""


class PendingRequests:
    """The requests that a run has yet to answer, dense from 0: a `RequestSource`.

    An engine looks a row up when it starts on it, not before; where that raises RequestError, the error is the row's
    end. Shapes: `numbers` int64[len(self)], the request of the store behind every row.
    """

    def __init__(self, store: TokenStore, numbers: Int64s) -> None:
        self.store = store
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int, /) -> Request:
        return self.store.request(int(self.numbers[index]), index)

    @property
    def can_be_withdrawn(self) -> bool:
        """May rows be dropped, or the run be told to begin nothing more, while it runs?"""
        return False

    @property
    def begins_no_more(self) -> bool:
        """Is the run to end with what runs? Rows that have not begun then raise RequestError."""
        return False

    def dropped(self) -> Int64s:
        """Rows that nobody wants any more, begun or not; each is told once. Engines may stop them."""
        return np.zeros(0, np.int64)

    def table(self) -> RequestTable:
        """Lengths and limits of every row, for a policy."""
        return self.store.table(self.numbers)

    def most_prompt_logprobs(self) -> int:
        """The most alternatives with which tokens of prompts are scored; -1 where no prompt is."""
        return self.store.most_prompt_logprobs(self.numbers)

    def embeds_any(self) -> bool:
        """Does any of them ask for a vector?"""
        return self.store.embeds_any(self.numbers)

    def flat_prompts(self) -> FlatPrompts:
        """All prompts end to end."""
        return self.store.flat_prompts(self.numbers)

    def prefix_tree(self) -> PrefixTree:
        """All prompts as a tree, for a plan."""
        tree = PrefixTree.from_flat(self.flat_prompts())
        self.store.release()
        return tree


def withdrawn_error() -> RequestError:
    """The end of a request that nobody wants any more."""
    return RequestError("the request was withdrawn", code=WITHDRAWN)


def plan_pending(
    pending: PendingRequests, table: RequestTable, cost: CostModel, *, block_size: int = BLOCK_SIZE
) -> Plan:
    """Plan what a job has yet to answer. Shapes: row i of `table` is row i of `pending`."""
    return make_plan(pending.prefix_tree(), table, cost, block_size=block_size)

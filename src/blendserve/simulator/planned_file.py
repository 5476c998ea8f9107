"""A batch file as a plan for a machine."""

from __future__ import annotations

import numpy as np

from blendserve.job.batch_input import BatchInput
from blendserve.planner.base import RequestTable
from blendserve.planner.lengths import Lengths
from blendserve.planner.plan import Plan, make_plan
from blendserve.planner.tree import PrefixTree
from blendserve.simulator.machine import Machine
from blendserve.simulator.workloads.knowledge import GivenLengths


def plan_batch(batch: BatchInput, machine: Machine, num_output_tokens: int | None) -> Plan:
    """Plan the requests of a file for a machine; `num_output_tokens` is what unknown lengths are assumed to be."""

    def assumed(_: PrefixTree, table: RequestTable) -> Lengths:
        most = np.minimum(np.maximum(table.max_output_tokens, 1), num_output_tokens or 1)
        return GivenLengths(np.where(table.known_output_tokens >= 0, table.known_output_tokens, most))

    tree = PrefixTree.from_flat(batch.prompts)
    lengths = assumed if num_output_tokens else None
    return make_plan(tree, batch.table, machine.cost.cost_model(), lengths=lengths)

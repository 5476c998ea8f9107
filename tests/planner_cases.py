"""Small jobs for planner tests: prompts by value, hypothesis strategies, and an engine of a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles import Prompt

from blendserve.costs.model_cost import CostModel
from blendserve.planner.base import Int64s, Policy, RequestTable
from blendserve.planner.plan import Plan, make_plan
from blendserve.planner.tree import PrefixTree

COST = CostModel(token_s=1.0, kv_token_s=0.02, pair_s=0.0)
QUADRATIC_COST = CostModel(token_s=1.0, kv_token_s=0.02, pair_s=0.01)

prompts_strategy = st.lists(st.lists(st.integers(0, 2), max_size=8).map(tuple), max_size=14)
outputs_strategy = st.integers(0, 12)


def tree_of(prompts: Sequence[Prompt]) -> PrefixTree:
    tree = PrefixTree.from_prompts(np.array(prompt, dtype=np.int32) for prompt in prompts)
    tree.check()
    return tree


def table_of(prompts: Sequence[Prompt], outputs: Sequence[int], *, is_known: bool = True) -> RequestTable:
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    known = np.array(outputs, dtype=np.int64) if is_known else np.full(len(prompts), -1, dtype=np.int64)
    most = np.array(outputs, dtype=np.int64) if is_known else np.full(len(prompts), 64, dtype=np.int64)
    return RequestTable(lengths, most, known)


def plan_of(
    prompts: Sequence[Prompt],
    outputs: Sequence[int],
    *,
    is_known: bool = True,
    cost: CostModel = COST,
    block_size: int = 1,
) -> Plan:
    """Prompts of a few tokens share every one of them unless there is a block size."""
    return make_plan(tree_of(prompts), table_of(prompts, outputs, is_known=is_known), cost, block_size=block_size)


def ranges(values: Sequence[int]) -> Int64s:
    return np.array(values, dtype=np.int64)


@dataclass
class TinyEngine:
    """An engine in a few lines: whole prompts at admission, one token per sequence and step, the youngest preempted.

    Steps take the longer of compute and memory time. `admissions` and `schedule` are what tests look at.
    """

    policy: Policy
    prompts: Sequence[int]
    outputs: Sequence[int]
    capacity_tokens: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 256
    cost: CostModel = COST
    admissions: list[int] = field(default_factory=list)
    schedule: list[tuple[int, list[int]]] = field(default_factory=list)  # per step: prefill budget, who runs
    num_preemptions: int = 0
    elapsed_s: float = 0.0
    num_steps: int = 0
    rows: list[list[int]] = field(default_factory=list)  # request, computed, outputs

    @property
    def free_tokens(self) -> int:
        return self.capacity_tokens - sum(self.prompts[row[0]] + row[2] for row in self.rows)

    @property
    def request_index(self) -> Int64s:
        return self._column(0)

    @property
    def num_prompt_tokens(self) -> Int64s:
        return ranges([self.prompts[row[0]] for row in self.rows])

    @property
    def num_computed_tokens(self) -> Int64s:
        return self._column(1)

    @property
    def num_output_tokens(self) -> Int64s:
        return self._column(2)

    def _column(self, number: int) -> NDArray[np.int64]:
        return ranges([row[number] for row in self.rows])

    def run(self, max_steps: int = 100_000) -> None:
        kept: dict[int, int] = {}
        while self.rows or self.policy.num_waiting:
            assert self.num_steps < max_steps, "starved"
            self._grow(kept)
            self._admit(kept)
            assert self.rows, "nothing runs, nothing is proposed"
            self._step()
            assert self.free_tokens >= 0, "KV memory exceeded"
            self.num_steps += 1

    def _grow(self, kept: dict[int, int]) -> None:
        while self.free_tokens < len(self.rows) and len(self.rows) > 1:
            request, _, outputs = self.rows.pop()
            kept[request] = outputs
            self.num_preemptions += 1
            self.policy.preempted(request, outputs)

    def _admit(self, kept: dict[int, int]) -> None:
        while len(self.rows) < self.max_num_seqs and (request := self.policy.next(self)) is not None:
            assert self.policy.next(self) == request, "another proposal before the first was confirmed"
            outputs = kept.get(request, 0)
            if self.rows and self.prompts[request] + outputs + len(self.rows) + 1 > self.free_tokens:
                return
            kept.pop(request, None)
            self.rows.append([request, 0, outputs])
            self.admissions.append(request)
            self.policy.admitted(request, 0)

    def _step(self) -> None:
        left = self.policy.prefill_tokens(self)
        self.schedule.append((left, [row[0] for row in self.rows]))
        decodes = [row for row in self.rows if row[1] >= self._size(row) - 1 and row[2] > 0]
        if not decodes:
            left = max(left, 1)
        read = sum(row[1] + 1 for row in decodes)
        num_tokens = len(decodes)
        for row in self.rows:
            if row in decodes:
                row[1] += 1
                row[2] += 1
                continue
            chunk = min(left, self._size(row) - row[1])
            left -= chunk
            num_tokens += chunk
            row[1] += chunk
            if row[1] == self._size(row) and self.outputs[row[0]] > 0:
                row[2] += 1
        for row in [row for row in self.rows if row[1] >= self._size(row) - 1 and row[2] >= self.outputs[row[0]]]:
            self.rows.remove(row)
            self.policy.finished(row[0], row[2])
        self.elapsed_s += max(self.cost.token_s * max(num_tokens, 8), self.cost.kv_token_s * read)

    def _size(self, row: list[int]) -> int:
        return self.prompts[row[0]] + row[2]

"""An executor without a model: the cost model says how long each step takes, on a virtual clock (paper sections 2 and
9).

The engine loop, batcher, block pool, prefix cache and policies around it are those of real runs.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from blendserve.config import BLOCK_SIZE
from blendserve.costs.step_cost import StepCost
from blendserve.engine.step import NO_PROMPT_RESULT, Int32s, PromptResult, StepPlan, StepResult
from blendserve.errors import CapacityError
from blendserve.request import Request


class SimulatedExecutor:
    """Times the steps of one replica.

    A decode reads the KV of its whole context, its own new token included; blocks that several decodes of a step read
    cost the later ones `cost.shared_kv_share`. Cached prefixes are not scheduled, so they cost nothing. Prefill
    attention counts as compute where `cost.pair_s` says so. `now_s` is the virtual time.
    """

    needs_tokens = False
    eos_token_ids: tuple[int, ...] = ()

    def __init__(self, cost: StepCost, capacity_tokens: int, *, block_size: int = BLOCK_SIZE) -> None:
        if capacity_tokens < block_size:
            raise CapacityError(f"{capacity_tokens} tokens of KV memory do not hold one block of {block_size}")
        self.cost = cost
        self.block_size = block_size
        self.num_blocks = capacity_tokens // block_size
        self.now_s = 0.0
        self._tokens = np.zeros(0, dtype=np.int32)

    def admit(self, slot: int, request: Request) -> None:
        pass

    def release(self, slot: int) -> None:
        pass

    def kept_with(self, request: Request) -> Hashable | None:  # noqa: ARG002
        return None

    def prompt_result(self, slot: int, blocks: Int32s) -> PromptResult:  # noqa: ARG002
        return NO_PROMPT_RESULT

    def close(self) -> None:
        pass

    def execute(self, plan: StepPlan) -> StepResult:
        """Time one step; the tokens are zeros. The first `plan.num_decode_tokens` entries are the decodes."""
        num_decodes = plan.num_decode_tokens
        num_kv_tokens = float(plan.num_computed_tokens[:num_decodes].sum(dtype=np.int64)) + num_decodes
        if self.cost.shared_kv_share < 1:
            num_kv_tokens -= (1 - self.cost.shared_kv_share) * self._num_repeated_tokens(plan)
        num_pairs = 0.0
        if self.cost.pair_s and plan.num_prefill_tokens:
            chunks = plan.num_scheduled_tokens[num_decodes:].astype(np.float64)
            num_pairs = float(np.dot(chunks, plan.num_computed_tokens[num_decodes:] + (chunks + 1) / 2))
        num_sampled = int(np.count_nonzero(plan.is_sampled))
        num_tokens = self.num_multiplied_tokens(plan)
        compute_s = self.cost.compute_s(num_tokens, num_pairs, num_sampled)
        memory_s = self.cost.memory_s(num_kv_tokens)
        elapsed_s = self.cost.step_s(num_tokens, compute_s, memory_s)
        self.now_s += elapsed_s
        return StepResult(self._zeros(num_sampled), elapsed_s, {}, compute_s, memory_s)

    def num_multiplied_tokens(self, plan: StepPlan) -> int:
        """Tokens that go through the matrix products of this step."""
        return plan.num_decode_tokens + plan.num_prefill_tokens

    def _num_repeated_tokens(self, plan: StepPlan) -> int:
        """Tokens in full blocks that a decode reads and one before it in the step has read."""
        slots, computed = plan.slots[: plan.num_decode_tokens], plan.num_computed_tokens[: plan.num_decode_tokens]
        tables = plan.block_tables[slots]
        blocks = tables[np.arange(tables.shape[1]) < (computed // self.block_size)[:, None]]
        return (len(blocks) - int(np.count_nonzero(np.bincount(blocks)))) * self.block_size

    def _zeros(self, num_sampled: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        if num_sampled > len(self._tokens):
            self._tokens = np.zeros(2 * num_sampled, dtype=np.int32)
        return self._tokens[:num_sampled]

"""Who holds KV memory and which tokens the next step computes: admission, growth, preemption, step plans.

Decides nothing about order (the policy does) and runs nothing (the executor does). Paper section 6.1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from blendserve.config import EngineConfig
from blendserve.engine.blocks import BlockPool
from blendserve.engine.finish import stop_rules_of
from blendserve.engine.prefix_cache import PrefixCache
from blendserve.engine.sequence import NO_TOKENS, Int32s, Int64s, Sequence, SequenceTable
from blendserve.engine.step import Executor, StepPlan
from blendserve.planner.base import EngineLimits, Policy, SchedulerView, scheduler_view

NO_LIMIT = 2**31
"""Context length in tokens where the configuration sets none: only the memory limits a request then."""

GATED_BLOCKS = 8
"""Growth of every running sequence, in blocks, for which a preemption makes admissions careful. 600 simulated requests,
served first come first served from a full pool, were preempted 1189 times without care, 644 times with care for one
admission, 130 times with this, 118 times with care for ever."""


class Schedule(NamedTuple):
    """A plan and the table rows of its entries: `num_decodes` decode entries first, then prefill chunks."""

    plan: StepPlan
    rows: Int64s
    num_decodes: int


class Batcher:
    """The state of admission, which a policy reads through `view`, and the operations that change it.

    A preempted request could be admitted into the memory it just gave up and be preempted again. So for some steps
    after a preemption an admission must leave a free block for every running sequence. Outputs are kept, and a
    sequence in decode has won a token since its admission, so preemptions are bounded by the tokens still to be
    generated: no livelock under any policy.
    """

    def __init__(self, executor: Executor, config: EngineConfig, has_stop_checker: bool) -> None:
        self._executor = executor
        self.block_size = executor.block_size
        self.capacity_tokens = executor.num_blocks * executor.block_size
        self.max_model_len = config.max_model_len or NO_LIMIT
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self._limits = EngineLimits(self.capacity_tokens, config.max_num_seqs, config.max_num_batched_tokens)
        self.needs_tokens = executor.needs_tokens
        self.has_prefix_caching = config.enable_prefix_caching
        self.has_stop_checker = has_stop_checker
        self.pool = BlockPool(executor.num_blocks, executor.block_size)
        self.cache = PrefixCache(self.pool)
        max_blocks = min(executor.num_blocks, self.num_blocks_for(self.max_model_len))
        max_tokens = min(self.max_model_len, self.capacity_tokens + 1)  # the last output token needs no KV
        self.table = SequenceTable(config.max_num_seqs, max_tokens, max_blocks, executor.needs_tokens)
        self._num_gated_steps = 0
        self._all_rows = np.arange(config.max_num_seqs)
        self._ones = np.ones(config.max_num_seqs, np.int32)

    def view(self) -> SchedulerView:
        """What a policy may see now."""
        return scheduler_view(self._limits, self.free_tokens, self.table.progress)

    # KV memory

    @property
    def free_tokens(self) -> int:
        """Tokens in blocks that are free or may be evicted."""
        return self.num_available_blocks * self.block_size

    @property
    def num_available_blocks(self) -> int:
        """Blocks that are free or may be evicted."""
        return self.pool.num_free + self.cache.num_evictable

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _allocate(self, count: int) -> Int32s:
        if count > self.pool.num_free:
            self.cache.evict(count - self.pool.num_free)
        return self.pool.allocate(count)

    def try_admit(self, sequence: Sequence) -> bool:
        """Give `sequence` a slot and KV blocks for all its tokens; False, changing nothing, where they do not fit now.

        The last token is always left to compute, so a prompt of full blocks that are all cached recomputes its last
        block into one of its own: a block that others read is never written.
        """
        num_blocks = self.num_blocks_for(sequence.num_tokens)
        num_running = self.table.num_running
        spare = self.num_available_blocks - (num_running if self._num_gated_steps > 0 else 0)
        limit = min(len(sequence.keys), (sequence.num_tokens - 1) // self.block_size)
        if self.table.is_full or num_blocks - limit > spare:
            return False
        matched = np.array(self.cache.match(sequence.keys, limit), np.int32)
        num_matched = len(matched)
        if num_blocks - num_matched > spare - self.cache.num_evictable_of(matched):
            return False
        self.cache.acquire(matched)
        own = self._allocate(num_blocks - num_matched)
        slot = self.table.add(
            sequence,
            num_cached_tokens=num_matched * self.block_size,
            num_reserved_tokens=num_blocks * self.block_size,
            stop_rules=stop_rules_of(sequence.request, self.has_stop_checker),
        )
        self.table.widen(num_blocks)
        self.table.block_tables[slot, :num_matched] = matched
        self.table.block_tables[slot, num_matched:num_blocks] = own
        self._executor.admit(slot, sequence.request)
        sequence.dependency_block = int(matched[-1]) if num_matched else -1
        sequence.num_keyed_blocks = num_matched + self.cache.register(sequence.keys, num_matched, own, slot)
        return True

    def grow(self, policy: Policy) -> list[Sequence]:
        """Give every decode the block that its next token needs, preempting those who lose least until it fits.

        Returns the preempted sequences, in the order in which they lost their memory. One that runs alone and needs
        more than there is stays as it is: see `is_outgrown`.
        """
        table = self.table
        preempted: list[Sequence] = []
        self._num_gated_steps -= 1
        while True:
            rows = (table.num_computed_tokens >= table.num_reserved_tokens).nonzero()[0]
            if len(rows) <= self.num_available_blocks:
                break
            if table.num_running == 1:
                return preempted
            preempted += self.preempt(self._cheapest_row(), policy)
        if len(rows):
            columns = table.num_reserved_tokens[rows] // self.block_size
            table.widen(int(columns.max()) + 1)
            table.block_tables[table.slot[rows], columns] = self._allocate(len(rows))
            table.num_reserved_tokens[rows] += self.block_size
        return preempted

    @property
    def is_outgrown(self) -> bool:
        """Does the only running sequence need more than the whole pool?"""
        table = self.table
        is_full = table.num_running == 1 and bool(table.num_computed_tokens[0] >= table.num_reserved_tokens[0])
        return is_full and self.num_available_blocks == 0

    def _cheapest_row(self) -> int:
        """The row with the fewest computed tokens of its own, the youngest among equals."""
        loss = self.table.num_computed_tokens - self.table.num_cached_tokens
        return self.table.num_running - 1 - int(np.argmin(loss[::-1]))

    def preempt(self, row: int, policy: Policy) -> list[Sequence]:
        """Take the KV memory of a row, and of those that wait for blocks it has not computed yet; outputs are kept."""
        preempted: list[Sequence] = []
        while (dependent := self._youngest_dependent(row)) is not None:
            preempted += self.preempt(dependent, policy)
        sequence = self.table.sequence(row)
        sequence.output_token_ids = self.table.output_token_ids(row).copy() if self.needs_tokens else NO_TOKENS
        sequence.num_output_tokens = int(self.table.num_output_tokens[row])
        policy.preempted(sequence.request.index, sequence.num_output_tokens)
        self.remove([row])
        self._num_gated_steps = GATED_BLOCKS * self.block_size
        return [*preempted, sequence]

    def _youngest_dependent(self, row: int) -> int | None:
        owner = self.table.sequence(row).slot
        for other in self.table.is_prefilling.nonzero()[0][::-1].tolist():
            block = self.table.sequence(other).dependency_block
            if block >= 0 and not self.cache.is_computed(block) and self.cache.owner(block) == owner:
                return int(other)
        return None

    def remove(self, rows: list[int]) -> None:
        """End `rows` (ascending): their slots and blocks are given back, shared and still useful ones to the cache."""
        for row in rows:
            sequence = self.table.sequence(row)
            num_blocks = int(self.table.num_reserved_tokens[row]) // self.block_size
            blocks = self.table.block_tables[sequence.slot, :num_blocks]
            own = blocks[sequence.num_keyed_blocks :]
            self.pool.release(own)
            self.pool.free(own)
            if sequence.num_keyed_blocks:
                self.cache.release(blocks[: sequence.num_keyed_blocks])
            self._executor.release(sequence.slot)
        self.table.remove(rows)

    # Steps

    def plan(self, max_prefill_tokens: int) -> Schedule:
        """All decodes, then prefill chunks in order of admission within `max_prefill_tokens`. Mutates nothing.

        A step without decodes computes at least one token, whatever the budget.
        """
        table = self.table
        prefills = table.is_prefilling.nonzero()[0].tolist()
        if not prefills:
            return self._schedule(self._all_rows[: table.num_running], [], table.num_running)
        decodes = (table.is_prefilling == 0).nonzero()[0]
        budget = min(max_prefill_tokens, self.max_num_batched_tokens - len(decodes))
        if budget <= 0 and not len(decodes):
            budget = self.max_num_batched_tokens
        rows, chunks = self._prefill_chunks(prefills, budget)
        return self._schedule(np.concatenate((decodes, np.array(rows, np.int64))), chunks, len(decodes))

    def _prefill_chunks(self, candidates: list[int], budget: int) -> tuple[list[int], list[int]]:
        """Rows and chunk lengths. A row whose prefix another computes follows it in the same step, or waits."""
        table = self.table
        rows: list[int] = []
        chunks: list[int] = []
        end_by_slot: dict[int, int] = {}
        for row in candidates:
            if budget <= 0:
                break
            sequence = table.sequence(row)
            block = sequence.dependency_block
            if block >= 0 and not self.cache.is_computed(block):
                matched_end = int(table.num_cached_tokens[row])
                if end_by_slot.get(self.cache.owner(block), 0) < matched_end:
                    continue
            begin = int(table.num_computed_tokens[row])
            chunk = min(budget, sequence.num_tokens - begin)
            end_by_slot[sequence.slot] = begin + chunk
            rows.append(row)
            chunks.append(chunk)
            budget -= chunk
        return rows, chunks

    def _schedule(self, rows: Int64s, chunks: list[int], num_decodes: int) -> Schedule:
        table = self.table
        computed = table.num_computed_tokens[rows].astype(np.int32)
        num_scheduled = self._ones[: len(rows)].copy()
        is_sampled = num_scheduled.astype(np.bool_)
        if chunks:
            prefills = rows[num_decodes:]
            num_scheduled[num_decodes:] = chunks
            num_tokens = table.num_prompt_tokens[prefills] + table.num_output_tokens[prefills]
            is_last_chunk = computed[num_decodes:] + num_scheduled[num_decodes:] == num_tokens
            is_sampled[num_decodes:] = is_last_chunk & (table.max_output_tokens[prefills] > 0)
        plan = StepPlan(
            slots=table.slot[rows].astype(np.int32),
            num_scheduled_tokens=num_scheduled,
            num_computed_tokens=computed,
            is_sampled=is_sampled,
            token_ids=table.token_ids,
            block_tables=table.block_tables,
            num_prefill_tokens=sum(chunks),
            num_decode_tokens=num_decodes,
        )
        return Schedule(plan, rows, num_decodes)

    def apply(self, schedule: Schedule, token_ids: Int32s) -> Int64s:
        """Enter what a step computed and sampled into the table; returns the rows that sampled, as in `token_ids`."""
        table = self.table
        plan, rows = schedule.plan, schedule.rows
        table.num_computed_tokens[rows] += plan.num_scheduled_tokens
        for row in rows[schedule.num_decodes :].tolist():
            self._apply_prefill(row)
        sampled = rows[plan.is_sampled] if plan.num_prefill_tokens else rows
        if self.needs_tokens:
            slots = table.slot[sampled]
            table.token_ids[slots, table.num_prompt_tokens[sampled] + table.num_output_tokens[sampled]] = token_ids
        table.num_output_tokens[sampled] += 1
        return sampled

    def _apply_prefill(self, row: int) -> None:
        table = self.table
        sequence = table.sequence(row)
        computed = int(table.num_computed_tokens[row])
        keyed = table.block_tables[sequence.slot, : min(computed // self.block_size, sequence.num_keyed_blocks)]
        self.cache.mark_computed(keyed)
        if computed == sequence.num_tokens:
            table.is_prefilling[row] = 0

    def check(self) -> None:
        """Assert the invariants of pool, cache and table, and that their references agree. For tests: slow."""
        self.pool.check()
        self.cache.check()
        self.table.check(self.block_size)
        expected = np.zeros(self.pool.num_blocks, np.int64)
        for row in range(self.table.num_running):
            num_blocks = int(self.table.num_reserved_tokens[row]) // self.block_size
            np.add.at(expected, self.table.block_tables[self.table.slot[row], :num_blocks], 1)
        assert (expected == self.pool.ref_counts).all(), "references do not match the block tables"
        used = int(np.count_nonzero(expected))
        assert used + self.num_available_blocks == self.pool.num_blocks, "a block leaked"

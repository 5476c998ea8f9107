"""The running sequences as arrays, one column of one table each, so that a step costs array operations only.

What few sequences need or what changes rarely lives in one `Sequence` per request; what changes every step is an array.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as ImmutableSequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from blendserve.request import Request, TokenIds, TokenLogprob

if TYPE_CHECKING:
    import llguidance

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
NO_TOKENS: TokenIds = np.zeros(0, np.int32)
FIRST_TABLE_WIDTH = 64
"""Blocks per row of the first block tables. They widen by doubling: full width would be gigabytes for a large pool."""


@dataclass(slots=True)
class Sequence:
    """The run-time state of one request that the table does not hold.

    `slot` is -1 while it waits; `output_token_ids` and `num_output_tokens` are what a preempted sequence keeps.
    `num_keyed_blocks` leading blocks of its table belong to the prefix cache; it may compute nothing before
    `dependency_block`, the last block that it matched, is computed (-1: it matched none). `num_cached_tokens` is the
    prefix hit of its first admission. `matcher` is where it stands in its grammar, None where it has none.
    """

    request: Request
    max_output_tokens: int
    keys: ImmutableSequence[Hashable]
    slot: int = -1
    num_keyed_blocks: int = 0
    dependency_block: int = -1
    num_cached_tokens: int = -1
    num_output_tokens: int = 0
    output_token_ids: TokenIds = field(default_factory=lambda: NO_TOKENS)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    matcher: llguidance.LLMatcher | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and kept output tokens: what an admission has to bring into the KV memory."""
        return self.request.num_prompt_tokens + self.num_output_tokens


class SequenceTable:
    """All running sequences in order of admission: row 0 is the oldest. A row's slot stays, its row number does not.

    Shapes: every column property int64[num_running], a view that is valid until a row is added or removed;
    `token_ids` int32[max_num_seqs, max_model_len], empty where the executor never looks at tokens; `block_tables`
    int32[max_num_seqs, blocks of the longest so far]; both by slot. `cached` counts tokens of prefix hits, `reserved`
    those of all blocks held.
    """

    _NUM_COLUMNS = 11

    def __init__(self, max_num_seqs: int, max_model_len: int, max_blocks: int, needs_tokens: bool) -> None:
        self.max_num_seqs = max_num_seqs
        self.num_running = 0
        self._columns = np.zeros((self._NUM_COLUMNS, max_num_seqs), np.int64)
        self._shown = self._columns[1:5]
        self._shown.flags.writeable = False
        self._zero_tokens = np.broadcast_to(np.int32(0), max_model_len)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._sequence_by_slot: list[Sequence | None] = [None] * max_num_seqs
        self.token_ids = np.zeros((max_num_seqs, max_model_len) if needs_tokens else (0, 0), np.int32)
        self.block_tables = np.zeros((max_num_seqs, min(max_blocks, FIRST_TABLE_WIDTH)), np.int32)
        self._max_blocks = max_blocks

    @property
    def slot(self) -> Int64s:
        return self._columns[0, : self.num_running]

    @property
    def progress(self) -> Int64s:
        """Request index, prompt, computed and output tokens, not to be written: int64[4, num_running]."""
        return self._shown[:, : self.num_running]

    @property
    def request_index(self) -> Int64s:
        return self._columns[1, : self.num_running]

    @property
    def num_prompt_tokens(self) -> Int64s:
        return self._columns[2, : self.num_running]

    @property
    def num_computed_tokens(self) -> Int64s:
        return self._columns[3, : self.num_running]

    @property
    def num_output_tokens(self) -> Int64s:
        return self._columns[4, : self.num_running]

    @property
    def max_output_tokens(self) -> Int64s:
        return self._columns[5, : self.num_running]

    @property
    def min_output_tokens(self) -> Int64s:
        return self._columns[6, : self.num_running]

    @property
    def num_cached_tokens(self) -> Int64s:
        return self._columns[7, : self.num_running]

    @property
    def num_reserved_tokens(self) -> Int64s:
        return self._columns[8, : self.num_running]

    @property
    def is_prefilling(self) -> Int64s:
        return self._columns[9, : self.num_running]

    @property
    def stop_rules(self) -> Int64s:
        """Sum of the rules of blendserve.engine.finish that apply."""
        return self._columns[10, : self.num_running]

    @property
    def is_full(self) -> bool:
        return not self._free_slots

    def sequence(self, row: int) -> Sequence:
        sequence = self._sequence_by_slot[int(self._columns[0, row])]
        assert sequence is not None
        return sequence

    def add(self, sequence: Sequence, num_cached_tokens: int, num_reserved_tokens: int, stop_rules: int) -> int:
        """Append a row that has everything but its cached tokens to compute; returns its slot.

        Mutates: sequence (slot, num_cached_tokens at the first admission).
        """
        request = sequence.request
        slot = self._free_slots.pop()
        sequence.slot = slot
        if sequence.num_cached_tokens < 0:
            sequence.num_cached_tokens = num_cached_tokens
        self._sequence_by_slot[slot] = sequence
        self._columns[:, self.num_running] = (
            slot,
            request.index,
            request.num_prompt_tokens,
            num_cached_tokens,
            sequence.num_output_tokens,
            sequence.max_output_tokens,
            request.sampling.min_tokens,
            num_cached_tokens,
            num_reserved_tokens,
            1,
            stop_rules,
        )
        self.num_running += 1
        if self.token_ids.size:
            self.token_ids[slot, : request.num_prompt_tokens] = request.prompt_token_ids
            self.token_ids[slot, request.num_prompt_tokens : sequence.num_tokens] = sequence.output_token_ids
        return slot

    def widen(self, num_blocks: int) -> None:
        """Make block tables that hold `num_blocks` a row."""
        width = self.block_tables.shape[1]
        if num_blocks > width:
            assert num_blocks <= self._max_blocks, "a sequence is longer than the context or the pool"
            wider = np.zeros((self.max_num_seqs, min(max(2 * width, num_blocks), self._max_blocks)), np.int32)
            wider[:, :width] = self.block_tables
            self.block_tables = wider

    def output_token_ids(self, row: int) -> TokenIds:
        """Output tokens of one row: a view, or that many zeros where the executor makes no tokens."""
        count = int(self.num_output_tokens[row])
        if not self.token_ids.size:
            return self._zero_tokens[:count]
        begin = int(self.num_prompt_tokens[row])
        return self.token_ids[self.slot[row], begin : begin + count]

    def remove(self, rows: list[int]) -> None:
        """Drop `rows` (ascending), keeping the order of the others; their slots may be given out again."""
        for row in rows:
            sequence = self.sequence(row)
            self._sequence_by_slot[sequence.slot] = None
            self._free_slots.append(sequence.slot)
            sequence.slot = -1
        first, last = rows[0], self.num_running
        if len(rows) == 1:
            self._columns[:, first : last - 1] = self._columns[:, first + 1 : last]
        else:
            is_kept = np.ones(last - first, np.bool_)
            is_kept[np.array(rows) - first] = False
            kept = np.compress(is_kept, self._columns[:, first:last], axis=1)
            self._columns[:, first : first + kept.shape[1]] = kept
        self.num_running -= len(rows)

    def check(self, block_size: int) -> None:
        """Assert the invariants of the columns: computed within reserved, outputs within limits, slots distinct."""
        assert len(set(self.slot.tolist())) + len(self._free_slots) == self.max_num_seqs
        assert (self.num_cached_tokens <= self.num_computed_tokens).all()
        assert (self.num_computed_tokens <= self.num_reserved_tokens).all(), "computed tokens without a block"
        assert (self.num_reserved_tokens % block_size == 0).all()
        assert (self.num_output_tokens <= self.max_output_tokens).all()
        num_tokens = self.num_prompt_tokens + self.num_output_tokens
        assert (self.num_computed_tokens[self.is_prefilling == 0] == num_tokens[self.is_prefilling == 0] - 1).all()
        for row in range(self.num_running):
            assert self.sequence(row).slot == self.slot[row]

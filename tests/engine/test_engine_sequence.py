"""Sequence table: rows stay in order of admission, slots stay with their sequence."""

from __future__ import annotations

import pytest
from engine_scenarios import make_request

from blendserve.engine.sequence import Sequence, SequenceTable


def make_table(num_rows: int) -> SequenceTable:
    table = SequenceTable(max_num_seqs=8, max_model_len=32, max_blocks=8, needs_tokens=True)
    for index in range(num_rows):
        sequence = Sequence(make_request(index, range(index + 1), 5), max_output_tokens=5, keys=())
        table.add(sequence, num_cached_tokens=0, num_reserved_tokens=8, stop_rules=0)
    return table


@pytest.mark.parametrize("rows", [[0], [3], [7], [0, 7], [2, 3, 5], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_removal_keeps_the_order_and_the_slots_of_the_others(rows: list[int]) -> None:
    table = make_table(8)
    slots = table.slot.tolist()
    table.remove(rows)
    kept = [row for row in range(8) if row not in rows]
    assert table.request_index.tolist() == kept
    assert table.slot.tolist() == [slots[row] for row in kept]
    assert table.num_prompt_tokens.tolist() == [row + 1 for row in kept]
    table.check(block_size=4)


def test_freed_slots_are_given_out_again_with_their_tokens_replaced() -> None:
    table = make_table(8)
    assert table.is_full
    table.remove([5])
    request = make_request(9, [7, 7, 7], 5)
    slot = table.add(Sequence(request, 5, ()), num_cached_tokens=0, num_reserved_tokens=4, stop_rules=0)
    assert table.request_index.tolist() == [0, 1, 2, 3, 4, 6, 7, 9]
    assert table.token_ids[slot, :3].tolist() == [7, 7, 7]
    assert table.slot[7] == slot


def test_widening_keeps_block_tables_and_stops_at_the_limit() -> None:
    table = SequenceTable(max_num_seqs=2, max_model_len=8, max_blocks=200, needs_tokens=False)
    table.block_tables[1, 63] = 5
    table.widen(65)
    assert table.block_tables.shape == (2, 128)
    assert table.block_tables[1, 63] == 5
    table.widen(200)
    assert table.block_tables.shape == (2, 200)
    with pytest.raises(AssertionError, match="longer than the context or the pool"):
        table.widen(201)

"""Block keys: equal exactly where the tokens are equal from the start of the prompt."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from blendserve.engine.keys import block_keys

TOKENS = st.lists(st.integers(0, 2), max_size=20)


@given(first=TOKENS, second=TOKENS, block_size=st.integers(1, 5))
def test_keys_are_equal_exactly_where_prefixes_are(first: list[int], second: list[int], block_size: int) -> None:
    keys = [block_keys(np.array(tokens, np.int32), block_size) for tokens in (first, second)]
    assert [len(k) for k in keys] == [len(first) // block_size, len(second) // block_size]
    for j in range(min(len(keys[0]), len(keys[1]))):
        end = (j + 1) * block_size
        assert (keys[0][j] == keys[1][j]) == (first[:end] == second[:end])


def test_keys_behave_as_a_sequence_and_ignore_memory_layout() -> None:
    tokens = np.arange(64, dtype=np.int32)
    keys = block_keys(tokens, 16)
    assert list(keys) == [keys[0], keys[1], keys[2], keys[3]]
    assert list(keys[1:3]) == [keys[1], keys[2]]
    assert list(block_keys(np.repeat(tokens, 2)[::2], 16)) == list(keys)

"""Prompts in lexicographic order, with the prefix that neighbours share: all a prefix tree needs to know of tokens.

Big-endian token ids compare as byte strings, so the sort is one `memcmp` per comparison; shared prefixes are measured
stretch by stretch for all neighbours at once. Nothing here knows costs or lengths of outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from blendserve.request import TokenIds

Int64s = NDArray[np.int64]

_CHUNK_TOKENS = 1 << 22  # tokens turned into byte strings at a time: bounds the temporary copy at 16 MB
_STRETCH_TOKENS = 64  # 256 bytes, four cache lines, compared per neighbour and round
_PAIRS_PER_ROUND = 1 << 14  # 2 x 4 MB of stretches at a time: stays in the last-level cache


class FlatPrompts(NamedTuple):
    """All prompts end to end: prompt i is token_ids[offsets[i] : offsets[i + 1]]."""

    token_ids: TokenIds
    offsets: Int64s

    def __len__(self) -> int:
        return len(self.offsets) - 1


class SortedPrompts(NamedTuple):
    """Prompts in lexicographic order, ties by index. Shapes: all int64[num_requests], in sorted order.

    `lcp[i]` is the number of leading tokens that sorted prompts i - 1 and i share; `lcp[0]` is 0.
    """

    order: Int64s
    lcp: Int64s
    lengths: Int64s


def flatten(prompts: Iterable[TokenIds]) -> FlatPrompts:
    """Join prompts into one array (a copy)."""
    arrays = [np.asarray(prompt, dtype=np.int32) for prompt in prompts]
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return FlatPrompts(np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32), offsets)


def sort_prompts(prompts: FlatPrompts) -> SortedPrompts:
    """Sort prompts and measure what neighbours share. Token ids must not be negative."""
    order = _lexicographic_order(prompts)
    starts, lengths = prompts.offsets[:-1][order], np.diff(prompts.offsets)[order]
    lcp = np.zeros(len(order), dtype=np.int64)
    if len(order) > 1:
        limits = np.minimum(lengths[:-1], lengths[1:])
        lcp[1:] = _common_prefixes(prompts.token_ids, starts[:-1], starts[1:], limits)
    return SortedPrompts(order, lcp, lengths)


def _lexicographic_order(prompts: FlatPrompts) -> Int64s:
    keys: list[bytes] = []
    offsets = prompts.offsets
    begin = 0
    while begin < len(prompts):
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + _CHUNK_TOKENS, side="right")) - 1)
        chunk = prompts.token_ids[offsets[begin] : offsets[end]].astype(">i4").tobytes()
        bounds = ((offsets[begin : end + 1] - offsets[begin]) * 4).tolist()
        keys += [chunk[first:last] for first, last in pairwise(bounds)]
        begin = end
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _common_prefixes(token_ids: TokenIds, starts_a: Int64s, starts_b: Int64s, limits: Int64s) -> Int64s:
    """Length of the common prefix of token_ids[a : a + limit] and token_ids[b : b + limit], for every pair."""
    shared = np.zeros(len(limits), dtype=np.int64)
    padded_tail = np.concatenate([token_ids[-_STRETCH_TOKENS:], np.full(_STRETCH_TOKENS, -1, dtype=np.int32)])
    tail_start = max(0, len(token_ids) - _STRETCH_TOKENS)
    for begin in range(0, len(limits), _PAIRS_PER_ROUND):
        active = np.arange(begin, min(begin + _PAIRS_PER_ROUND, len(limits)))
        while len(active):
            done = shared[active]
            stretches_a = _stretches(token_ids, padded_tail, tail_start, starts_a[active] + done)
            stretches_b = _stretches(token_ids, padded_tail, tail_start, starts_b[active] + done)
            is_different = stretches_a != stretches_b
            first = np.where(is_different.any(axis=1), is_different.argmax(axis=1), _STRETCH_TOKENS)
            reached = np.minimum(done + first, limits[active])
            shared[active] = reached
            active = active[(first == _STRETCH_TOKENS) & (reached < limits[active])]
    return shared


def _stretches(token_ids: TokenIds, padded_tail: TokenIds, tail_start: int, starts: Int64s) -> TokenIds:
    """Rows of _STRETCH_TOKENS tokens from each start; rows near the end of the array come from its padded copy."""
    is_tail = starts >= tail_start
    if not is_tail.any():
        return sliding_window_view(token_ids, _STRETCH_TOKENS)[starts]
    rows = np.empty((len(starts), _STRETCH_TOKENS), dtype=np.int32)
    if not is_tail.all():
        rows[~is_tail] = sliding_window_view(token_ids, _STRETCH_TOKENS)[starts[~is_tail]]
    rows[is_tail] = sliding_window_view(padded_tail, _STRETCH_TOKENS)[starts[is_tail] - tail_start]
    return rows

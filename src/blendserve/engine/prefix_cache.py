"""Reuse of prompt blocks at run time: which block holds the content named by a key, and which to evict first.

Keys are chained (a key names all tokens up to its block), so a dictionary acts as a radix tree. Unreferenced blocks are
kept in contiguous pieces of chains, with the same next use, so that eviction looks at pieces and not at blocks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from itertools import islice, takewhile

import numpy as np

from blendserve.engine.blocks import BlockPool, Int32s

NextUse = Callable[[Hashable], float]


class _Piece:
    """Unreferenced computed blocks [start, len(blocks)) of one chain: reused from the front, evicted from the back."""

    __slots__ = ("blocks", "start")

    def __init__(self, blocks: list[int]) -> None:
        self.blocks = blocks
        self.start = 0

    def __len__(self) -> int:
        return len(self.blocks) - self.start


class PrefixCache:
    """Blocks of `pool` by key. A registered block is pending until its owner has computed it, then shared by all.

    `next_use(key)` ranks unreferenced blocks: the largest is evicted first, the longest unused among equals, and a
    block that is never used again is freed at once. It is expected not to decrease along a chain; one that does costs
    hits, not correctness.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.num_evictable = 0
        self.next_use: NextUse = lambda _: 0.0
        self._pool = pool
        self._block_by_key: dict[Hashable, int] = {}
        self._key_by_block: dict[int, Hashable] = {}
        self._owner_by_block = np.full(pool.num_blocks, -1, np.int32)
        self._piece_by_block: list[_Piece | None] = [None] * pool.num_blocks
        self._is_computed = np.zeros(pool.num_blocks, np.bool_)
        self._heap: list[tuple[float, int, _Piece]] = []  # (-next use, age, piece); empty pieces are dropped when met
        self._num_retired = 0

    def __len__(self) -> int:
        return len(self._block_by_key)

    def match(self, keys: Sequence[Hashable], limit: int) -> list[int]:
        """Blocks of the longest cached chain of the first `limit` keys, pending ones included. Mutates nothing."""
        blocks: list[int] = []
        find = self._block_by_key.get
        for key in islice(keys, limit):
            block = find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_evictable_of(self, blocks: Int32s) -> int:
        """How many of the matched `blocks` are unreferenced, so that acquiring them takes evictable memory."""
        return len(blocks) - int(np.count_nonzero(self._pool.ref_counts[blocks]))

    def acquire(self, blocks: Int32s) -> None:
        """Reference the matched `blocks`, which leave their pieces."""
        num_unused = self.num_evictable_of(blocks)
        self._pool.acquire(blocks)
        if not num_unused:
            return
        self.num_evictable -= num_unused
        for block in blocks[len(blocks) - num_unused :].tolist():  # references never grow along a chain
            piece = self._piece_by_block[block]
            assert piece is not None
            assert piece.blocks[piece.start] == block
            piece.start += 1

    def register(self, keys: Sequence[Hashable], begin: int, blocks: Int32s, owner: int) -> int:
        """Make `blocks` pending under keys[begin:], owned by slot `owner`; stops at the first key that is taken.
        Returns how many were registered.
        """
        own = list(islice(keys, begin, begin + len(blocks)))
        if not self._block_by_key.keys().isdisjoint(own):
            own = list(takewhile(lambda key: key not in self._block_by_key, own))
        registered = blocks[: len(own)]
        numbers = registered.tolist()
        self._block_by_key.update(zip(own, numbers, strict=True))
        self._key_by_block.update(zip(numbers, own, strict=True))
        self._owner_by_block[registered] = owner
        self._is_computed[registered] = False
        return len(own)

    def is_computed(self, block: int) -> bool:
        return bool(self._is_computed[block])

    def owner(self, block: int) -> int:
        """Slot that computes the pending `block`."""
        return int(self._owner_by_block[block])

    def mark_computed(self, blocks: Int32s) -> None:
        self._is_computed[blocks] = True

    def release(self, blocks: Int32s) -> None:
        """Drop one reference to a chain of registered `blocks`; what nobody references is kept for reuse, or freed
        where it was never computed or has no next use.
        """
        self._pool.release(blocks)
        num_used = int(np.count_nonzero(self._pool.ref_counts[blocks]))
        unused = blocks[num_used:]
        num_computed = int(np.count_nonzero(self._is_computed[unused]))
        self._forget(unused[num_computed:].tolist())
        self._retire(unused[:num_computed].tolist())

    def evict(self, count: int) -> None:
        """Free `count` unreferenced blocks, those needed last first."""
        assert count <= self.num_evictable, "more blocks to evict than are unreferenced"
        while count > 0:
            negative_use, age, piece = self._heap[0]
            if not piece:
                heapq.heappop(self._heap)
                continue
            use = self.next_use(self._key_by_block[piece.blocks[-1]])
            if -use > negative_use:  # needed sooner than when it was ranked
                heapq.heapreplace(self._heap, (-use, age, piece))
                continue
            taken = min(count, len(piece))
            victims = piece.blocks[-taken:]
            del piece.blocks[-taken:]
            self.num_evictable -= taken
            count -= taken
            self._forget(victims)

    def clear(self) -> None:
        """Free every unreferenced block."""
        for _, _, piece in self._heap:
            self.num_evictable -= len(piece)
            self._forget(piece.blocks[piece.start :])
        self._heap.clear()

    def _retire(self, blocks: list[int]) -> None:
        start = 0
        while start < len(blocks):
            use = self.next_use(self._key_by_block[blocks[start]])
            if use == math.inf:
                self._forget(blocks[start:])
                break
            end = self._end_of_use(blocks, start, use)
            piece = _Piece(blocks[start:end])
            for block in piece.blocks:
                self._piece_by_block[block] = piece
            self._num_retired += 1
            heapq.heappush(self._heap, (-use, self._num_retired, piece))
            self.num_evictable += end - start
            start = end
        if len(self._heap) > 2 * self.num_evictable + 64:
            self._heap = [entry for entry in self._heap if entry[2]]
            heapq.heapify(self._heap)

    def _end_of_use(self, blocks: list[int], start: int, use: float) -> int:
        """End of the piece of a chain from `start` on that has the same next use, by bisection."""
        low, high = start + 1, len(blocks)
        if self.next_use(self._key_by_block[blocks[-1]]) == use:
            return high
        while low < high:
            middle = (low + high) // 2
            if self.next_use(self._key_by_block[blocks[middle]]) == use:
                low = middle + 1
            else:
                high = middle
        return low

    def _forget(self, blocks: list[int]) -> None:
        if blocks:
            for key in map(self._key_by_block.pop, blocks):
                del self._block_by_key[key]
            self._pool.free(np.array(blocks, np.int32))

    def check(self) -> None:
        """Assert the invariants: pieces hold exactly the unreferenced registered blocks, all of them computed."""
        assert self._key_by_block == {block: key for key, block in self._block_by_key.items()}
        in_pieces = [block for _, _, piece in self._heap for block in piece.blocks[piece.start :]]
        assert len(in_pieces) == len(set(in_pieces)) == self.num_evictable, "pieces overlap or are miscounted"
        unused = {block for block in self._block_by_key.values() if self._pool.ref_counts[block] == 0}
        assert set(in_pieces) == unused, "pieces are not the unreferenced registered blocks"
        assert all(self._is_computed[block] for block in in_pieces), "a pending block may be evicted"

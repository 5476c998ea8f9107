"""Prefix cache: matching, pending blocks, and which block goes first."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pytest

from blendserve.engine.blocks import BlockPool, Int32s
from blendserve.engine.prefix_cache import PrefixCache

NEVER = float("inf")


def chain(name: str, length: int, shared: str = "") -> list[Hashable]:
    """Keys of a chain that begins with the characters of `shared` and goes on alone."""
    text = shared + name * (length - len(shared))
    return [text[: end + 1] for end in range(length)]


class Fixture:
    """A cache whose next uses are a table by key (0 where absent)."""

    def __init__(self, num_blocks: int = 16) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.cache = PrefixCache(self.pool)
        self.use: dict[Hashable, float] = {}
        self.num_asked = 0
        self.cache.next_use = self._next_use

    def _next_use(self, key: Hashable) -> float:
        self.num_asked += 1
        return self.use.get(key, 0.0)

    def take(self, keys: list[Hashable], num_computed: int | None = None) -> Int32s:
        """Admit a sequence of exactly these keys, of which the first `num_computed` (default: all) get computed."""
        matched = np.array(self.cache.match(keys, len(keys)), np.int32)
        self.cache.acquire(matched)
        own = self.pool.allocate(len(keys) - len(matched))
        assert self.cache.register(keys, len(matched), own, owner=0) == len(own)
        blocks = np.concatenate((matched, own))
        self.cache.mark_computed(blocks[:num_computed])
        return blocks

    def put(self, keys: list[Hashable]) -> None:
        """Admit and end one."""
        self.cache.release(self.take(keys))

    def cached(self, keys: list[Hashable]) -> int:
        self.cache.check()
        self.pool.check()
        return len(self.cache.match(keys, len(keys)))


def test_match_is_the_longest_chain_within_the_limit() -> None:
    f = Fixture()
    f.put(chain("a", 4))
    assert f.cached(chain("a", 6)) == 4
    assert f.cached(chain("b", 4, shared="aa")) == 2
    assert f.cached(chain("b", 4)) == 0
    assert len(f.cache.match(chain("a", 4), 3)) == 3


def test_matched_blocks_are_shared_and_no_longer_evictable() -> None:
    f = Fixture()
    f.put(chain("a", 4))
    assert f.cache.num_evictable == 4
    first = f.take(chain("b", 3, shared="aa"))
    second = f.take(chain("a", 4))
    assert first[:2].tolist() == second[:2].tolist()
    assert f.cache.num_evictable == 0
    assert f.pool.ref_counts[second].tolist() == [2, 2, 1, 1]
    f.cache.release(second)
    assert f.cache.num_evictable == 2
    f.cache.release(first)
    assert f.cache.num_evictable == 5
    f.cache.check()


def test_a_branch_takes_its_blocks_from_the_runs_of_other_chains() -> None:
    f = Fixture()
    f.put(chain("b", 4, shared="aa"))  # the run of a b-chain begins with the a-blocks that it shared
    f.put(chain("a", 5))
    f.put(chain("b", 4, shared="aa"))
    blocks = f.take(chain("a", 5))
    assert f.cached(chain("b", 4, shared="aa")) == 4
    f.cache.release(blocks)
    f.cache.check()


def test_the_block_needed_last_goes_first_and_from_the_end_of_its_chain() -> None:
    f = Fixture()
    f.use = dict.fromkeys(chain("a", 3), 5.0) | dict.fromkeys(chain("b", 3), 9.0) | dict.fromkeys(chain("c", 3), 7.0)
    for name in "abc":
        f.put(chain(name, 3))
    f.cache.evict(2)
    assert [f.cached(chain(name, 3)) for name in "abc"] == [3, 1, 3]
    f.cache.evict(3)
    assert [f.cached(chain(name, 3)) for name in "abc"] == [3, 0, 1]


def test_equals_go_in_order_of_last_use() -> None:
    f = Fixture()
    for name in "abca":
        f.put(chain(name, 3))
    f.cache.evict(4)
    assert [f.cached(chain(name, 3)) for name in "abc"] == [3, 0, 2]


def test_a_run_that_is_needed_sooner_than_it_was_is_ranked_again() -> None:
    f = Fixture()
    f.use = dict.fromkeys(chain("a", 3), 9.0) | dict.fromkeys(chain("b", 3), 5.0)
    f.put(chain("a", 3))
    f.put(chain("b", 3))
    f.use = dict.fromkeys(chain("a", 3), 1.0) | dict.fromkeys(chain("b", 3), 5.0)
    f.cache.evict(3)
    assert [f.cached(chain(name, 3)) for name in "ab"] == [3, 0]


def test_what_is_never_used_again_is_free_at_once_and_the_shared_part_stays() -> None:
    f = Fixture()
    keys = chain("a", 10, shared="xxxx")
    f.use = {key: NEVER if j >= 4 else 3.0 for j, key in enumerate(keys)}
    f.put(keys)
    assert f.cached(keys) == f.cache.num_evictable == 4
    assert f.pool.num_free == 12


def test_runs_split_where_the_next_use_changes_and_are_ranked_with_few_questions() -> None:
    f = Fixture(num_blocks=256)
    keys = chain("a", 200)
    f.use = {key: 1.0 if j < 70 else 2.0 for j, key in enumerate(keys)}
    f.put(keys)
    assert f.num_asked <= 20
    f.put(chain("b", 20))
    f.cache.evict(130)
    assert f.cached(keys) == 70
    assert f.cached(chain("b", 20)) == 20


def test_pending_blocks_are_matched_and_forgotten_when_their_owner_leaves() -> None:
    f = Fixture()
    blocks = f.take(chain("a", 4), num_computed=2)
    assert f.cache.match(chain("a", 4), 4) == blocks.tolist()
    assert [f.cache.is_computed(block) for block in blocks.tolist()] == [True, True, False, False]
    f.cache.release(blocks)
    assert f.cached(chain("a", 4)) == f.cache.num_evictable == 2
    assert f.pool.num_free == 14


def test_registration_stops_at_a_key_that_another_block_holds() -> None:
    f = Fixture()
    f.take(chain("a", 3))
    own = f.pool.allocate(2)
    assert f.cache.register(chain("a", 4), 2, own, owner=1) == 0
    f.cache.check()


def test_reuse_without_eviction_does_not_grow_the_heap() -> None:
    f = Fixture()
    for _ in range(1000):
        f.put(chain("a", 4))
    assert len(f.cache._heap) < 200


def test_clear_frees_everything_unreferenced() -> None:
    f = Fixture()
    blocks = f.take(chain("a", 4))
    f.put(chain("b", 4))
    f.cache.clear()
    assert f.pool.num_free == 12
    f.cache.release(blocks)
    f.cache.clear()
    assert f.pool.num_free == 16
    assert len(f.cache) == 0
    f.cache.check()


def test_evicting_more_than_there_is_is_a_bug() -> None:
    f = Fixture()
    f.put(chain("a", 4))
    with pytest.raises(AssertionError, match="more blocks to evict"):
        f.cache.evict(5)

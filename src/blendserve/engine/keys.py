"""Names for the content of prompt blocks: equal keys mean equal tokens from the start of the prompt."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray


class BlockKeys(Sequence[Hashable]):
    """The keys of the full blocks of one prompt, computed when first looked at. Immutable to the outside."""

    __slots__ = ("_block_size", "_keys", "_length", "_token_ids")

    def __init__(self, token_ids: NDArray[np.int32], block_size: int) -> None:
        self._token_ids = token_ids
        self._block_size = block_size
        self._length = len(token_ids) // block_size
        self._keys: tuple[bytes, ...] | None = None

    def _all(self) -> tuple[bytes, ...]:
        if self._keys is None:
            data = np.ascontiguousarray(self._token_ids, np.int32).tobytes()
            size = 4 * self._block_size
            chain = blake2b(digest_size=16)
            keys = []
            for begin in range(0, self._length * size, size):
                chain.update(data[begin : begin + size])
                keys.append(chain.copy().digest())
            self._keys = tuple(keys)
        return self._keys

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Hashable: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Hashable]: ...
    def __getitem__(self, index: int | slice) -> Hashable | Sequence[Hashable]:
        return self._all()[index]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._all())


class KeptKey(NamedTuple):
    """The key of a block that holds more than KV: `kept` says what."""

    kept: Hashable
    key: Hashable


def block_keys(token_ids: NDArray[np.int32], block_size: int) -> BlockKeys:
    """Keys of the full blocks of a prompt: entry j is a 16-byte BLAKE2b digest of tokens [0, (j + 1) * block_size).

    Two different contents share a key with probability 2**-128; among 2**32 blocks of one job some pair does with
    probability below 2**-64, far under the rate of undetected memory errors.
    """
    return BlockKeys(token_ids, block_size)

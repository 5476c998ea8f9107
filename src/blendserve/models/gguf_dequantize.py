"""Stored GGUF blocks to float32, bitwise as the `gguf` package does it.

The kinds of the default model are unpacked here (three to ten times faster: whole slices, buffers that stay in cache);
all others are left to that package, which is imported only then.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blendserve.errors import ConfigError
from blendserve.models.weights import Floats

Bytes = NDArray[np.uint8]

_BLOCK = 32  # elements per block of the kinds unpacked here
_CHUNK_BLOCKS = 4096  # 512 KB of float32 at a time stays in a second-level cache


def dequantize(stored: Bytes, kind: str) -> Floats:
    """Shapes: `stored` [rows, bytes per row] -> [rows, elements per row]."""
    if kind in ("F64", "F32", "F16", "BF16"):
        return _from_floats(stored, kind)
    if kind in ("Q4_0", "Q4_1"):
        return _from_nibbles(stored, kind)
    if kind == "Q8_0":
        return _from_bytes(stored)
    import gguf  # imported here for start-up: it takes about as long as numpy

    try:
        unpacked: Floats = gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])
    except (KeyError, NotImplementedError) as error:
        raise ConfigError(
            f"the installed gguf package cannot unpack {kind} weights; install a newer one: pip install -U gguf"
        ) from error
    return np.ascontiguousarray(unpacked, dtype=np.float32)


def _from_floats(stored: Bytes, kind: str) -> Floats:
    if kind == "F64":
        return stored.view("<f8").astype(np.float32)
    if kind == "F32":
        return stored.view("<f4").astype(np.float32)
    if kind == "F16":
        return stored.view("<f2").astype(np.float32)
    bits = stored.view("<u2").astype(np.uint32)
    return np.left_shift(bits, np.uint32(16), out=bits).view(np.float32)


def _from_nibbles(stored: Bytes, kind: str) -> Floats:
    """Q4_0: scale, 16 bytes; Q4_1: scale, minimum, 16 bytes. Low nibbles are elements 0..15, high ones 16..31."""
    num_scales = 2 if kind == "Q4_1" else 1
    blocks = stored.reshape(-1, 2 * num_scales + _BLOCK // 2)
    scales = np.ascontiguousarray(blocks[:, : 2 * num_scales]).view("<f2").astype(np.float32)
    unpacked = np.empty((len(blocks), 2, _BLOCK // 2), dtype=np.float32)
    nibbles = np.empty((_CHUNK_BLOCKS, 2, _BLOCK // 2), dtype=np.uint8)
    for begin in range(0, len(blocks), _CHUNK_BLOCKS):
        chunk = slice(begin, begin + _CHUNK_BLOCKS)
        packed = np.ascontiguousarray(blocks[chunk, 2 * num_scales :])
        np.bitwise_and(packed, 15, out=nibbles[: len(packed), 0])
        np.right_shift(packed, 4, out=nibbles[: len(packed), 1])
        values = unpacked[chunk]
        values[...] = nibbles[: len(packed)]
        if kind == "Q4_0":
            values -= 8.0
        values *= scales[chunk, 0, None, None]
        if kind == "Q4_1":
            values += scales[chunk, 1, None, None]
    return unpacked.reshape(len(stored), -1)


def _from_bytes(stored: Bytes) -> Floats:
    """Q8_0: scale, 32 signed bytes."""
    blocks = stored.reshape(-1, 2 + _BLOCK)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    unpacked = np.empty((len(blocks), _BLOCK), dtype=np.float32)
    for begin in range(0, len(blocks), _CHUNK_BLOCKS):
        chunk = slice(begin, begin + _CHUNK_BLOCKS)
        unpacked[chunk] = blocks[chunk, 2:].view(np.int8)
        unpacked[chunk] *= scales[chunk]
    return unpacked.reshape(len(stored), -1)

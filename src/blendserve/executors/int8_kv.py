"""The executable specification of KV in 8-bit integers, in NumPy: how tokens are rounded, and attention over them.

The reference model uses it. Keys, values and queries of a head are multiplied by a Hadamard matrix first, which spreads
channels that are large in every token over all channels; it leaves scores as they were, and outputs are multiplied by
it again (csrc/ops/rotation.h). Each token and head is rounded by itself (csrc/kv_cache.cpp).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blendserve.engine.step import Int32s
from blendserve.models.spec import ModelSpec
from blendserve.models.weights import round_to_bf16

Floats = NDArray[np.float32]
Array = NDArray[np.floating[Any]]

CHUNK_TOKENS = 64  # csrc/ops/attention.h

_HEAD_MULTIPLE = 16  # heads are filled up with zeros, csrc/ops/attention.h
_LEAST_MAGNITUDE = np.float32(2.0**-60)
_QUERY_TOP = np.float32(32512)  # csrc/ops/attention_int8_avx512vnni.cpp
_WEIGHT_TOP_LOG2 = np.float32(15.999)
_LOG2_E = np.float32(np.log2(np.e))


class Int8Kv(NamedTuple):
    """Some tokens of one layer. Shapes: integers [m, kv_heads, head_dim filled up], the others [m, kv_heads]."""

    keys: Floats
    key_scales: Floats
    values: Floats
    value_logs: Floats
    """Logarithms, to base 2, of the scales of values."""


class Int8KvCache:
    """K and V of every layer, in blocks, rounded to integers."""

    def __init__(self, spec: ModelSpec, num_blocks: int, block_size: int) -> None:
        heads = (spec.num_layers, num_blocks, block_size, spec.num_kv_heads)
        elements = (*heads, _filled_up(spec.head_dim))
        shapes = (elements, heads, elements, heads)
        self._block_size = block_size
        self._parts = Int8Kv(*(np.full(shape, np.nan, dtype=np.float32) for shape in shapes))  # a wrong read shows

    def write(self, layer: int, blocks: Int32s, positions: NDArray[np.int64], keys: Array, values: Array) -> None:
        """Store rows for these positions. Shapes: `keys`, `values` [n, kv_heads, head_dim]. Mutates: this."""
        at = blocks[positions // self._block_size], positions % self._block_size
        for stored, part in zip(self._parts, round_to_int8(keys, values), strict=True):
            stored[layer][at] = part

    def read(self, layer: int, blocks: Int32s, num_tokens: int) -> Int8Kv:
        """Positions [0, num_tokens)."""
        positions = np.arange(num_tokens)
        at = blocks[positions // self._block_size], positions % self._block_size
        return Int8Kv(*(part[layer][at] for part in self._parts))


def round_to_int8(keys: Array, values: Array) -> Int8Kv:
    """Shapes: [n, kv_heads, head_dim]. Scales are bfloat16, a little larger than needed: no integer leaves
    [-127, 127]."""
    keys, values = spread(keys), spread(values)
    scales = round_to_bf16(_largest(keys) * (np.float32(1.004) / np.float32(127)))
    logs = np.log2(_largest(values) / np.float32(127))
    logs = round_to_bf16(logs + np.float32(0.004) * np.abs(logs) + np.float32(0.001))
    key_integers = np.rint(keys * (np.float32(1) / scales)[..., None] + np.float32(128)) - np.float32(128)
    return Int8Kv(key_integers, scales, np.rint(values * np.exp2(-logs)[..., None]), logs)


def spread(heads: Array) -> Floats:
    """Heads filled up with zeros, times the Hadamard matrix. Shapes: [..., head_dim] -> [..., head_dim filled up]."""
    head_dim = heads.shape[-1]
    filling = [(0, 0)] * (heads.ndim - 1) + [(0, _filled_up(head_dim) - head_dim)]
    mixed = np.pad(heads.astype(np.float32), filling)
    half = 1
    while half < _num_mixed(mixed.shape[-1]):
        pairs = mixed.reshape(*heads.shape[:-1], -1, 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        mixed = np.stack([low + high, low - high], axis=-2).reshape(mixed.shape)
        half *= 2
    return mixed


def attend_by_floats(queries: Array, kv: Int8Kv, is_future: NDArray[np.bool_]) -> Floats:
    """Attention that multiplies the integers as floats. Shapes: `queries` [n, kv_heads, group, head_dim], divided by
    the root of the head size already, `is_future` [n, m] -> as the queries."""
    mixed_queries = spread(queries)
    num_mixed = np.float32(_num_mixed(mixed_queries.shape[-1]))
    scores = np.einsum("nhgd,mhd->nhgm", mixed_queries / num_mixed, kv.keys) * kv.key_scales.T[:, None, :]
    scores = np.where(is_future[:, None, None, :], np.float32(-np.inf), scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("nhgm,mhd->nhgd", weights * np.exp2(kv.value_logs).T[:, None, :], kv.values) / total
    result: Floats = spread(mixed)[..., : queries.shape[-1]] / num_mixed
    return result


def attend_by_integers(queries: Array, kv: Int8Kv, is_future: NDArray[np.bool_]) -> Floats:
    """The same with queries and weights in 16-bit integers, as kernels for AVX512-VNNI multiply.

    The logarithm of a value's scale is added to the token's score. Weights are rounded relative to the largest score
    up to the end of their chunk, so they depend on where chunks begin.
    """
    mixed_queries = spread(queries)
    num_mixed = np.float32(_num_mixed(mixed_queries.shape[-1]))
    top = np.maximum(np.abs(mixed_queries).max(axis=-1, keepdims=True), np.float32(2.0**-100))
    integers = np.rint(mixed_queries * (_QUERY_TOP / top))
    # Sums of integers are exact in float64.
    sums = np.einsum("nhgd,mhd->nhgm", integers.astype(np.float64), kv.keys.astype(np.float64)).astype(np.float32)
    query_scales = top / _QUERY_TOP * (_LOG2_E / num_mixed)
    scores = sums * (kv.key_scales.T[:, None, :] * query_scales) + kv.value_logs.T[:, None, :]
    scores = np.where(is_future[:, None, None, :], np.float32(-np.inf), scores)
    inverse_scales = np.exp2(-kv.value_logs).T[:, None, :]
    largest = np.full((*queries.shape[:-1], 1), -np.inf, dtype=np.float32)
    total, mixed = np.zeros_like(largest), np.zeros_like(mixed_queries)
    for begin in range(0, len(kv.keys), CHUNK_TOKENS):
        chunk = slice(begin, begin + CHUNK_TOKENS)
        larger = np.maximum(largest, scores[..., chunk].max(axis=-1, keepdims=True))
        weights = np.exp2(scores[..., chunk] - (larger - _WEIGHT_TOP_LOG2))
        decay, largest = np.exp2(largest - larger), larger
        total = total * decay + (weights * inverse_scales[..., chunk]).sum(axis=-1, keepdims=True)
        added = np.einsum("nhgm,mhd->nhgd", np.rint(weights).astype(np.float64), kv.values[chunk].astype(np.float64))
        mixed = mixed * decay + added.astype(np.float32)
    result: Floats = spread(mixed / total)[..., : queries.shape[-1]] / num_mixed
    return result


def _largest(heads: Floats) -> Floats:
    largest: Floats = np.maximum(np.abs(heads).max(axis=-1), _LEAST_MAGNITUDE)
    return largest


def _filled_up(head_dim: int) -> int:
    return -(-head_dim // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


def _num_mixed(head_dim: int) -> int:
    """Channels that are mixed with each other: the largest power of two that divides `head_dim`."""
    return head_dim & -head_dim

"""The integers of int8 products, as csrc/ops/matmul_int8.cpp makes them: a scale per row of weights, and per row of
activations and group of neighbours in it.

Products of these integers are exact, so the native core's kernels agree with this in every bit where their inputs do.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_MAX = np.float32(127)
_MAX_GROUP = 256
_NOTHING = np.float32(2.0**-100)
"""Rows below it are zeros: 127 over their largest might be infinite."""


class Int8Rows(NamedTuple):
    """Rows as whole numbers in [-127, 127] times a scale for each group. Shapes: [n, k] and [n, groups]."""

    values: NDArray[np.float64]
    scales: Floats


def int8_weights(weights: Floats) -> Int8Rows:
    """Round each row of a matrix. Two neighbours (2 i, 2 i + 1) of one sign add up to 128 at most, which keeps their
    products with unsigned bytes within 16 bits. Shapes: [n, k]."""
    num_inputs = weights.shape[1]
    first, second = weights[:, 0::2], np.zeros((len(weights), -(-num_inputs // 2)), dtype=np.float32)
    second[:, : num_inputs // 2] = weights[:, 1::2]
    bound = np.maximum(np.maximum(np.abs(first), np.abs(second)), np.abs(first + second)).max(axis=1, keepdims=True)
    return Int8Rows(_rounded(weights, bound), _scales(bound))


def int8_activations(x: Floats) -> Int8Rows:
    """Round each group of a row to the nearest multiple of its largest absolute value over 127. Shapes: [n, k]."""
    groups = [x[:, group] for group in _groups(x.shape[1])]
    bounds = [np.abs(group).max(axis=1, keepdims=True) for group in groups]
    values = [_rounded(group, bound) for group, bound in zip(groups, bounds, strict=True)]
    return Int8Rows(np.concatenate(values, axis=1), np.concatenate([_scales(bound) for bound in bounds], axis=1))


def int8_product(x: Int8Rows, weights: Int8Rows) -> Floats:
    """x W^T, group after group. Shapes: [m, k], [n, k] -> [m, n]."""
    product: Floats = np.zeros((len(x.values), len(weights.values)), dtype=np.float32)
    for i, group in enumerate(_groups(x.values.shape[1])):
        sums = x.values[:, group] @ weights.values[:, group].T  # whole numbers, exact in float64
        product += sums.astype(np.float32) * x.scales[:, i : i + 1]
    return product * weights.scales.T


def _groups(num_inputs: int) -> list[slice]:
    """Groups of at most `_MAX_GROUP` neighbours, as even as multiples of 16 allow."""
    size = -(-num_inputs // -(-num_inputs // _MAX_GROUP))
    size = -(-size // 16) * 16
    return [slice(begin, min(begin + size, num_inputs)) for begin in range(0, num_inputs, size)]


def _rounded(rows: Floats, bound: Floats) -> NDArray[np.float64]:
    inverse = np.divide(_MAX, bound, out=np.zeros_like(bound), where=bound >= _NOTHING)
    return np.rint(rows * inverse).astype(np.float64)


def _scales(bound: Floats) -> Floats:
    return np.where(bound >= _NOTHING, bound / _MAX, np.float32(0))

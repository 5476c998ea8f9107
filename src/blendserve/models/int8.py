"""The integers of int8 products, as csrc/ops/matmul_int8.cpp makes them: a scale per row of weights or activations.

Products of these integers are exact, so the native core's kernels agree with this in every bit where their inputs do.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_MAX = np.float32(127)
_NOTHING = np.float32(2.0**-100)
"""Rows below it are zeros: 127 over their largest might be infinite."""


class Int8Rows(NamedTuple):
    """Rows as whole numbers in [-127, 127] times a scale each. Shapes: [n, k] and [n, 1]."""

    values: NDArray[np.float64]
    scales: Floats


def int8_weights(weights: Floats) -> Int8Rows:
    """Round each row of a matrix. Two neighbours (2 i, 2 i + 1) of one sign add up to 128 at most, which keeps their
    products with unsigned bytes within 16 bits. Shapes: [n, k]."""
    num_inputs = weights.shape[1]
    first, second = weights[:, 0::2], np.zeros((len(weights), -(-num_inputs // 2)), dtype=np.float32)
    second[:, : num_inputs // 2] = weights[:, 1::2]
    bound = np.maximum(np.maximum(np.abs(first), np.abs(second)), np.abs(first + second)).max(axis=1, keepdims=True)
    return _rounded(weights, bound)


def int8_activations(x: Floats) -> Int8Rows:
    """Round each row to the nearest multiple of its largest absolute value over 127. Shapes: [n, k]."""
    return _rounded(x, np.abs(x).max(axis=1, keepdims=True))


def int8_product(x: Int8Rows, weights: Int8Rows) -> Floats:
    """x W^T. Shapes: [m, k], [n, k] -> [m, n]."""
    sums = (x.values @ weights.values.T).astype(np.float32)  # whole numbers, exact in float64
    product: Floats = sums * (x.scales * weights.scales.T)
    return product


def _rounded(rows: Floats, bound: Floats) -> Int8Rows:
    inverse = np.divide(_MAX, bound, out=np.zeros_like(bound), where=bound >= _NOTHING)
    return Int8Rows(
        np.rint(rows * inverse).astype(np.float64), np.where(bound >= _NOTHING, bound / _MAX, np.float32(0))
    )

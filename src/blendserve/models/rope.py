"""Rotary position frequencies of a model, in double precision: the one place that knows the scaling rules."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from blendserve.models.spec import ModelSpec, RopeScaling

Doubles = NDArray[np.float64]


def inverse_frequencies(spec: ModelSpec) -> Doubles:
    """Radians that a rotary pair turns per position. Shapes: [head_dim / 2], pair j is elements j, j + head_dim / 2."""
    plain = spec.rope_theta ** (-np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    return plain if spec.rope_scaling is None else plain / frequency_divisors(plain, spec.rope_scaling)


def frequency_divisors(plain: Doubles, scaling: RopeScaling) -> Doubles:
    """What frequencies are divided by: `factor` for all (linear), or for those slower than the old context (llama3)."""
    if scaling.kind == "linear":
        return np.full_like(plain, scaling.factor)
    turns = scaling.original_max_position * plain / (2.0 * math.pi)  # over the context that the model was trained on
    slow_share = (scaling.high_freq_factor - turns) / (scaling.high_freq_factor - scaling.low_freq_factor)
    slow_share = np.clip(slow_share, 0.0, 1.0)
    return np.asarray(1.0 / (slow_share / scaling.factor + (1.0 - slow_share)))

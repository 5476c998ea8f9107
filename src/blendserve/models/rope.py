"""Rotary position frequencies of a model, in double precision: the one place that knows the scaling rules."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from blendserve.models.spec import ModelSpec, RopeScaling

Doubles = NDArray[np.float64]
_SMALLEST_RAMP = 0.001


def inverse_frequencies(spec: ModelSpec) -> Doubles:
    """Radians that a rotary pair turns per position. Shapes: [head_dim / 2], pair j is elements j, j + head_dim / 2."""
    plain = spec.rope_theta ** (-np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    return plain if spec.rope_scaling is None else plain / frequency_divisors(plain, spec.rope_scaling, spec.rope_theta)


def attention_factor(spec: ModelSpec) -> float:
    """What cosines and sines of every position are multiplied by."""
    return 1.0 if spec.rope_scaling is None else spec.rope_scaling.attention_factor


def frequency_divisors(plain: Doubles, scaling: RopeScaling, theta: float) -> Doubles:
    """What frequencies are divided by: `factor` for all (linear), for those slower than the old context (llama3), along
    a ramp of pairs (yarn), or a number of its own for each (longrope).
    """
    if scaling.kind == "linear":
        return np.full_like(plain, scaling.factor)
    if scaling.kind == "longrope":
        return np.array(scaling.divisors, dtype=np.float64)
    if scaling.kind == "yarn":
        slow_share = _yarn_ramp(len(plain), scaling, theta)
    else:
        turns = scaling.original_max_position * plain / (2.0 * math.pi)  # over the context of the training
        slow_share = (scaling.high_freq_factor - turns) / (scaling.high_freq_factor - scaling.low_freq_factor)
        slow_share = np.clip(slow_share, 0.0, 1.0)
    return np.asarray(1.0 / (slow_share / scaling.factor + (1.0 - slow_share)))


def _yarn_ramp(num_pairs: int, scaling: RopeScaling, theta: float) -> Doubles:
    """0 for pairs that turn more than `beta_fast` times over the original context, 1 below `beta_slow`."""
    fast, slow = (_pair_of_turns(turns, num_pairs, scaling, theta) for turns in (scaling.beta_fast, scaling.beta_slow))
    low, high = (math.floor(fast), math.ceil(slow)) if scaling.truncates else (fast, slow)
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    if low == high:
        high += _SMALLEST_RAMP
    return np.clip((np.arange(num_pairs, dtype=np.float64) - low) / (high - low), 0.0, 1.0)


def _pair_of_turns(turns: float, num_pairs: int, scaling: RopeScaling, theta: float) -> float:
    """The pair, as a fraction, that turns so many times over the original context."""
    return num_pairs * math.log(scaling.original_max_position / (turns * 2.0 * math.pi)) / math.log(theta)

"""Rotary frequencies of every rule against transformers, for random parameters."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tiny_files import hf_config
from tiny_models import tiny_spec

from blendserve.models.hf_config import spec_from_hf_config
from blendserve.models.rope import attention_factor, inverse_frequencies

pytestmark = pytest.mark.peer
NUM_SEEDS = 40
FLOAT32_STEPS = 64
"""transformers computes powers of the base in float32, by a chain of roundings."""


def random_scaling(kind: str, head_dim: int, source: random.Random) -> dict[str, Any]:
    """Parameters of a rule as a config.json has them, optional ones now and then."""
    values: dict[str, Any] = {"rope_type": kind, "factor": source.choice((1.0, 1.5, 4.0, 32.0))}
    if kind == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": source.choice((2.0, 4.0))}
    if kind == "yarn":
        optional = {
            "beta_fast": source.choice((8, 32.0)),
            "beta_slow": source.choice((1, 0.25)),
            "mscale": source.choice((0.7, 1.0)),
            "mscale_all_dim": source.choice((0.5, 1.0)),
            "attention_factor": 1.3,
            "truncate": source.choice((True, False)),
        }
        values |= {key: value for key, value in optional.items() if source.random() < 0.5}
    if kind == "longrope":
        values |= {f"{name}_factor": [source.uniform(1, 9) for _ in range(head_dim // 2)] for name in ("short", "long")}
        if source.random() < 0.5:
            del values["factor"]
    if kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = source.choice((64, 256, 4096))
    return values


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "dynamic", "longrope"])
@pytest.mark.filterwarnings("ignore")
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for seed in range(NUM_SEEDS):
        source = random.Random(seed)
        head_dim, theta = source.choice((16, 64, 128)), source.choice((10000.0, 500000.0, 1e6))
        config = {**hf_config(tiny_spec()), "head_dim": head_dim, "rope_theta": theta, "max_position_embeddings": 8192}
        config["rope_scaling"] = random_scaling(kind, head_dim, source)
        spec = spec_from_hf_config("m", config)
        expected, factor = ROPE_INIT_FUNCTIONS[kind](transformers.AutoConfig.for_model(**config))
        found = inverse_frequencies(spec)
        np.testing.assert_allclose(found, expected.numpy(), rtol=FLOAT32_STEPS * 2**-24, err_msg=str(config))
        assert attention_factor(spec) == pytest.approx(factor, rel=1e-12), config

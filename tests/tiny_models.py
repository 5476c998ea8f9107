"""Tiny random models of every architecture, without torch: a `ModelSpec` and weights that are exact in bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np

from blendserve.models.hf_rope import yarn_mscale
from blendserve.models.spec import ModelSpec, RopeScaling
from blendserve.models.weights import MemoryWeights, expected_shapes, round_to_bf16

_LLAMA: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "eos_token_ids": (2,),
}

CHANGES_BY_NAME: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"has_tied_embeddings": True},
    "llama3-rope": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64), "rope_theta": 500000.0},
    "linear-rope": {"rope_scaling": RopeScaling("linear", 4.0)},
    "yarn-rope": {
        "rope_scaling": RopeScaling("yarn", 4.0, original_max_position=128, attention_factor=yarn_mscale(4.0))
    },
    "longrope": {
        "rope_scaling": RopeScaling(
            "longrope",
            1.5,
            original_max_position=512,
            attention_factor=1.25,
            divisors=tuple(1.0 + pair / 4 for pair in range(8)),
        )
    },
    "mha": {"num_kv_heads": 6},
    "mqa": {"num_kv_heads": 1},
    "head-64": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 64},
    "qwen2": {"architecture": "qwen2", "has_qkv_bias": True, "rms_norm_eps": 1e-6, "has_tied_embeddings": True},
    "qwen3": {"architecture": "qwen3", "has_qk_norm": True, "rms_norm_eps": 1e-6, "head_dim": 32},
}
"""Every tiny model, as what it changes of the tiny Llama."""


def tiny_spec(name: str = "llama", **changes: Any) -> ModelSpec:
    """One of `CHANGES_BY_NAME`, with further fields replaced by `changes`."""
    return ModelSpec(name=f"tiny-{name}", **{**_LLAMA, **CHANGES_BY_NAME[name], **changes})


def random_weights(spec: ModelSpec, seed: int = 0) -> MemoryWeights:
    """Random weights whose activations stay near unit scale and whose logits are spread enough for clear choices.

    Every value is exact in bfloat16, so that an engine which rounds its weights computes with the same ones.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_shapes(spec).items():
        if name.endswith("norm"):
            values = 1.0 + 0.1 * random.standard_normal(shape)
        elif name.endswith("bias"):
            values = 0.2 * random.standard_normal(shape)
        elif name == "embed_tokens":
            values = 0.3 * random.standard_normal(shape)
        else:
            values = random.standard_normal(shape) / np.sqrt(shape[-1])
        tensors[name] = round_to_bf16(values.astype(np.float32))
    return MemoryWeights(tensors)


def random_tokens(spec: ModelSpec, num_tokens: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Token ids that are never the end of a sequence."""
    low = max(spec.eos_token_ids, default=0) + 1
    return np.random.default_rng(seed).integers(low, spec.vocab_size, num_tokens).astype(np.int32)

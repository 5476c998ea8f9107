"""Shapes of well-known models by name, from their published `config.json`: enough for cost and simulation, not for
weights."""

from __future__ import annotations

from dataclasses import replace

from blendserve.errors import ConfigError
from blendserve.models.spec import ModelSpec

LLAMA_3_8B = ModelSpec(
    name="llama-3-8b",
    architecture="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position=8192,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
)
LLAMA_3_70B = replace(
    LLAMA_3_8B, name="llama-3-70b", hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64
)
LLAMA_2_7B = replace(
    LLAMA_3_8B,
    name="llama-2-7b",
    vocab_size=32000,
    intermediate_size=11008,
    num_kv_heads=32,
    max_position=4096,
    rope_theta=10000.0,
)
QWEN_2_5_7B = ModelSpec(
    name="qwen-2.5-7b",
    architecture="qwen2",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    max_position=32768,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    has_qkv_bias=True,
)
QWEN_2_5_72B = replace(
    QWEN_2_5_7B,
    name="qwen-2.5-72b",
    hidden_size=8192,
    intermediate_size=29568,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
)
DEEPSEEK_67B = ModelSpec(
    name="deepseek-67b",
    architecture="llama",
    vocab_size=102400,
    hidden_size=8192,
    intermediate_size=22016,
    num_layers=95,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    max_position=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
)
SMOLLM2_135M = ModelSpec(
    name="smollm2-135m",
    architecture="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position=8192,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    has_tied_embeddings=True,
)

MODEL_BY_NAME = {
    spec.name: spec
    for spec in (LLAMA_3_8B, LLAMA_3_70B, QWEN_2_5_7B, QWEN_2_5_72B, LLAMA_2_7B, DEEPSEEK_67B, SMOLLM2_135M)
}


def known_model(name: str) -> ModelSpec:
    """The shape of a model by its short name. Raises: ConfigError with the names that exist."""
    if name not in MODEL_BY_NAME:
        raise ConfigError(f"unknown model {name!r}; known: {', '.join(MODEL_BY_NAME)}; or give a path to a config.json")
    return MODEL_BY_NAME[name]

"""Configs of models that another engine runs: every number of a wrong kind is an error of one line."""

from __future__ import annotations

from typing import Any

import pytest
from hostile_models import VALUES
from tiny_files import hf_config
from tiny_models import tiny_spec

from blendserve.dialect.images import Picture
from blendserve.engines.vllm.arguments import context_length_of
from blendserve.engines.vllm.cost import MAX_PICTURE_TOKENS, model_cost_of, picture_tokens
from blendserve.errors import ConfigError
from blendserve.models.foreign_config import scale, text_config_of, whole_number

PARTS: dict[str, Any] = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "vision_config": {"patch_size": 14, "spatial_merge_size": 2, "image_size": 336},
    **{"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "shared_expert_intermediate_size": 8, "scale_factor": 2, "image_seq_length": None},
}
LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 8}
CONFIG: dict[str, Any] = {**hf_config(tiny_spec()), **PARTS, **LATENT}
WHOLE = Picture(digest="0123456789abcdef", width=100, height=60)


def read_all(config: dict[str, Any]) -> None:
    """Everything that is read of a config before vLLM is opened."""
    try:
        model_cost_of("m", config)
        context_length_of(text_config_of(config))
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
    assert len(message) < 500
    assert 0 < picture_tokens(WHOLE, config) <= MAX_PICTURE_TOKENS


@pytest.mark.parametrize("key", CONFIG)
def test_any_value_under_any_key(key: str) -> None:
    for value in VALUES:
        read_all({**CONFIG, key: value})
        read_all({"text_config": {**CONFIG, key: value}, "vision_config": PARTS["vision_config"]})


@pytest.mark.parametrize(
    ("part", "key"), [(part, key) for part in ("rope_scaling", "vision_config") for key in PARTS[part]]
)
def test_any_value_inside_a_part(part: str, key: str) -> None:
    for value in VALUES:
        read_all({**CONFIG, part: {**PARTS[part], key: value}})


@pytest.mark.parametrize("value", ["10", [1], {}, -1, True, 2**70, float("nan"), float("inf"), 1.5])
def test_what_is_no_number_is_named(value: Any) -> None:
    if value:
        with pytest.raises(ConfigError, match=r"vocab_size is .*; it must be a whole number"):
            whole_number({"vocab_size": value}, "vocab_size")


def test_numbers_that_are_not_there() -> None:
    assert whole_number({}, "x", 3) == whole_number({"x": None}, "x", 3) == whole_number({"x": 3.0}, "x") == 3
    assert scale({}, "x") == 1.0
    with pytest.raises(ConfigError, match="factor is 'x'"):
        scale({"factor": "x"}, "factor")


def test_a_deep_config() -> None:
    config: dict[str, Any] = {"hidden_size": 1}
    for _ in range(10_000):
        config = {"text_config": config}
    assert text_config_of(config) == {"hidden_size": 1}

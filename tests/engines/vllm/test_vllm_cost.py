"""Costs of models that vLLM runs, from their configs: against our own reading where there is one, by hand elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_files import byte_level_tokenizer, hf_config
from tiny_models import tiny_spec

from blendserve.costs.model_cost import ModelCost
from blendserve.dialect.images import Picture
from blendserve.engines.vllm.codec import VllmCodec
from blendserve.engines.vllm.cost import LoadTotals, cost_model_of, model_cost_of, picture_tokens
from blendserve.engines.vllm.inflight import StepLoad
from blendserve.errors import ConfigError, RequestError
from blendserve.models.conversation import Conversation
from blendserve.models.tokenizer import Tokenizer
from blendserve.request import TokenIds

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mha", "mqa", "head-64", "qwen3"])
def test_dense_models_cost_what_our_own_reading_says(name: str) -> None:
    spec = tiny_spec(name)
    ours = ModelCost.from_spec(spec)
    assert model_cost_of(spec.name, hf_config(spec)) == ours


def test_only_visited_experts_are_computed() -> None:
    config = {
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 16,
        "moe_intermediate_size": 5,
        "num_experts": 10,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "vocab_size": 7,
    }
    cost = model_cost_of("moe", config)
    attention = 3 * 8 * (2 * 8 + 8)
    assert cost.num_matmul_parameters == attention + 3 * 8 * 16 + 2 * 3 * 8 * (2 * 5 + 5)
    assert cost.weight_bytes == 2 * (attention + 3 * 8 * 16 + 2 * 3 * 8 * (10 * 5 + 5) + 2 * 7 * 8)
    assert cost.kv_bytes_per_token == 2 * 3 * 2 * 4


def test_latent_kv_is_small() -> None:
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 16,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "vocab_size": 7,
    }
    cost = model_cost_of("mla", config)
    assert cost.kv_bytes_per_token == 2 * 2 * (32 + 8)
    assert cost.attention_width == 4 * (16 + 8)


def test_the_language_model_of_several_parts_counts() -> None:
    text = hf_config(tiny_spec("llama"))
    assert model_cost_of("seer", {"text_config": text, "vision_config": {}}) == model_cost_of("seer", text)
    with pytest.raises(ConfigError, match="hidden_size is None"):
        model_cost_of("odd", {})


def test_the_device_decides_the_ratio() -> None:
    model = ModelCost.from_spec(tiny_spec("llama"))
    on_cpu, on_gpu = cost_model_of(model, "cpu"), cost_model_of(model, "NVIDIA H100 80GB HBM3")
    assert on_cpu.token_s > on_gpu.token_s
    assert cost_model_of(model, "a device nobody knows") == cost_model_of(model, "NVIDIA A100-SXM4-80GB")


def test_totals_are_sums_by_hand() -> None:
    model = ModelCost(
        "m",
        num_parameters=100,
        num_matmul_parameters=50,
        num_layers=2,
        attention_width=3,
        kv_bytes_per_token=8,
        weight_bytes=200,
        num_head_parameters=20,
    )
    totals = LoadTotals(model)
    totals.add(StepLoad(4, 1, num_pairs=8.0, num_kv_tokens=10.0, num_sampled_tokens=2))
    totals.add(StepLoad(0, 2, num_pairs=0.0, num_kv_tokens=20.0, num_sampled_tokens=2))
    assert totals.num_steps == 2
    assert totals.num_flop == 2 * 50 * 7 + 2 * 20 * 4 + 4 * 3 * 2 * (8 + 30)
    assert totals.num_bytes == 2 * 200 + 8 * (7 + 30)


@pytest.mark.parametrize(
    ("config", "picture", "count"),
    [
        ({}, Picture("a", 10, 10), 576),
        ({"vision_config": {}, "image_seq_length": 64}, Picture("a"), 64),
        ({"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}, Picture("a", 280, 141), 10 * 6),
        ({"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}, Picture("a"), 32 * 32),
        ({"vision_config": {"patch_size": 14, "image_size": 336}}, Picture("a", 9, 9), 576),
        ({"vision_config": {"patch_size": 16, "image_size": 512}, "scale_factor": 4}, Picture("a"), 64),
    ],
)
def test_pictures_are_counted_by_the_model(config: dict[str, Any], picture: Picture, count: int) -> None:
    assert picture_tokens(picture, config) == count


def test_pictures_stand_in_the_prompt_and_equal_ones_share_it() -> None:
    tokenizer = Tokenizer(byte_level_tokenizer(300), chat_template_source=TEMPLATE)
    config = {"vision_config": {}, "image_seq_length": 5}
    codec = VllmCodec(tokenizer, config, 1000)

    def conversation(digest: str, text: str) -> Any:
        return Conversation(({"role": "user", "content": text, "pictures": f"{digest}:0:0 {digest}:0:0"},))

    def encoded(codec: VllmCodec, *prompts: Any) -> list[TokenIds]:
        return [outcome for outcome in codec.encode(prompts) if not isinstance(outcome, RequestError)]

    hello, bye, other_hello = (
        conversation("0123456", "hello"),
        conversation("0123456", "bye"),
        conversation("6543210", "hello"),
    )
    first, same, other, plain = encoded(codec, hello, bye, other_hello, "hello")
    (text_only,) = encoded(codec, Conversation(({"role": "user", "content": "hello"},)))
    assert len(first) >= len(text_only) + 10
    assert len(np.flatnonzero(first >= 300)) == 10
    num_shared = int(np.argmin(first[: len(same)] == same[: len(first)]))
    assert num_shared > 10
    assert not (first[first >= 300] == other[other >= 300]).any()
    assert plain.tolist() == tokenizer.encode("hello").tolist()
    assert len(encoded(VllmCodec(tokenizer, config, 8), hello)[0]) == 7

"""Model shapes out of config.json: what is read, and what is refused with the field's name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_files import hf_config
from tiny_models import CHANGES_BY_NAME, tiny_spec

from blendserve.config import EngineConfig
from blendserve.engine.limits import resolve_limits
from blendserve.errors import ConfigError
from blendserve.models.hf_config import spec_from_hf_config
from blendserve.models.hf_rope import yarn_mscale
from blendserve.models.spec import RopeScaling

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


MISTRAL = {**SMOLLM2, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN3 = {**SMOLLM2, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
WINDOW = {"sliding_window": 128}
YARN = RopeScaling("yarn", 4.0, original_max_position=2048, attention_factor=yarn_mscale(4.0))
LONGROPE = RopeScaling("longrope", 1.0, original_max_position=8192, divisors=(2.0,) * 32)


@pytest.mark.parametrize("name", CHANGES_BY_NAME)
def test_every_architecture_is_read_back(name: str) -> None:
    spec = tiny_spec(name)
    assert spec_from_hf_config(spec.name, hf_config(spec)) == spec


def test_smollm2() -> None:
    spec = spec_from_hf_config("smollm2", SMOLLM2)
    assert (spec.head_dim, spec.kv_width, spec.rope_theta, spec.has_tied_embeddings) == (64, 192, 100000.0, True)
    assert spec.num_parameters == 49152 * 576 + 30 * (576 * (576 + 2 * 192 + 576) + 3 * 576 * 1536)
    assert spec.kv_bytes_per_token() == 30 * 192 * 2 * 2
    assert spec.kv_bytes_per_token("int8") == 30 * (192 * 2 + 3 * 2 * 2)  # and two scales of two bytes per head


def test_rope_parameters_as_transformers_5_writes_them() -> None:
    config = {key: value for key, value in SMOLLM2.items() if key not in ("rope_theta", "rope_scaling")}
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain = spec_from_hf_config("m", {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    scaled = spec_from_hf_config(
        "m", {**config, "rope_parameters": {**llama3, "original_max_position_embeddings": 8192}}
    )
    assert (plain.rope_theta, plain.rope_scaling) == (1e6, None)
    assert (scaled.rope_theta, scaled.rope_scaling) == (5e5, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192))


def test_old_names_and_defaults() -> None:
    """Llama 1 configs have no KV heads, no theta, and `type` instead of `rope_type`."""
    dropped = ("num_key_value_heads", "rope_theta", "tie_word_embeddings", "eos_token_id", "rms_norm_eps")
    config = {key: value for key, value in SMOLLM2.items() if key not in dropped}
    spec = spec_from_hf_config("m", {**config, "rope_scaling": {"type": "linear", "factor": 2}, "eos_token_id": [2, 3]})
    assert (spec.num_kv_heads, spec.rope_theta, spec.has_tied_embeddings) == (9, 10000.0, False)
    assert (spec.rope_scaling, spec.eos_token_ids, spec.rms_norm_eps) == (RopeScaling("linear", 2.0), (2, 3), 1e-6)


def test_mistral_without_a_window_is_llama() -> None:
    expected = spec_from_hf_config("m", SMOLLM2)
    for window in (None, 8192, 10_000):
        assert spec_from_hf_config("m", {**MISTRAL, "sliding_window": window}) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({**MISTRAL, "sliding_window": 4095}, 4095),
        ({**MISTRAL}, 4096),  # absent: what transformers assumes
        ({"sliding_window": 1000}, 1000),
        ({"sliding_window": 1000, "use_sliding_window": False}, 8192),
        ({**MISTRAL, "sliding_window": 1000, "use_sliding_window": False}, 1000),  # which nothing reads there
        ({**QWEN3, **WINDOW, "use_sliding_window": False}, 8192),
        ({**QWEN3, **WINDOW, "use_sliding_window": True, "max_window_layers": 30}, 8192),
        ({**QWEN3, **WINDOW, "use_sliding_window": True, "max_window_layers": 29}, 128),
        ({**QWEN3, **WINDOW, "use_sliding_window": True}, 128),
        ({**QWEN3, **WINDOW, "use_sliding_window": True, "layer_types": ["full_attention"] * 30}, 8192),
        ({**QWEN3, "use_sliding_window": True, "sliding_window": None}, 8192),
        ({"sliding_window": 128, "layer_types": ["full_attention"] * 29 + ["sliding_attention"]}, 128),
        ({"sliding_window": 9000, "layer_types": ["sliding_attention"] * 30}, 8192),
    ],
)
def test_a_window_limits_the_context(changes: dict[str, Any], expected: int) -> None:
    """Within a window, attention to all positions is the same."""
    spec = spec_from_hf_config("m", {**SMOLLM2, **changes})
    assert spec.max_position == expected
    assert (f"the last {expected} only" in spec.context_limit) == (expected < 8192) == bool(spec.notes)
    with pytest.raises(ConfigError, match="sliding window" if spec.context_limit else "was made for 8192"):
        resolve_limits(EngineConfig(max_model_len=expected + 1), spec)


@pytest.mark.parametrize(
    ("scaling", "max_position", "expected", "reach"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192, YARN, 8192),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 2048}, 2048, YARN, 8192),
        ({"rope_type": "yarn", "original_max_position_embeddings": 2048}, 8192, YARN, 8192),
        (
            {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0},
            2048,
            replace(YARN, attention_factor=2.0),
            8192,
        ),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192, None, 8192),
        ({"rope_type": "longrope", "short_factor": [2.0] * 32, "long_factor": [3.0] * 32}, 8192, LONGROPE, 8192),
        ({"type": "su", "short_factor": [2] * 32, "long_factor": [3] * 32, "factor": 1}, 8192, LONGROPE, 8192),
    ],
)
def test_rotary_scaling(scaling: dict[str, Any], max_position: int, expected: Any, reach: int) -> None:
    spec = spec_from_hf_config("m", {**SMOLLM2, "max_position_embeddings": max_position, "rope_scaling": scaling})
    assert (spec.rope_scaling, spec.max_position) == (expected, reach)


def test_longrope_ends_with_its_first_context() -> None:
    scaling = {"type": "longrope", "short_factor": [2.0] * 32, "long_factor": [3.0] * 32}
    config = {**SMOLLM2, "rope_scaling": scaling, "original_max_position_embeddings": 4096}
    spec = spec_from_hf_config("m", config)
    assert (spec.max_position, spec.rope_scaling and spec.rope_scaling.factor) == (4096, 2.0)
    assert "longrope turns every position otherwise" in spec.notes[0]


def test_rope_parameters_by_kind_of_layer() -> None:
    plain = {key: value for key, value in SMOLLM2.items() if key not in ("rope_theta", "rope_scaling")}
    full = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    nested: dict[str, Any]
    for nested in ({"full_attention": full}, {"full_attention": full, "sliding_attention": None}):
        spec = spec_from_hf_config("m", {**plain, "rope_parameters": nested})
        assert (spec.rope_theta, spec.rope_scaling) == (5e5, RopeScaling("linear", 2.0))
    other = {"full_attention": full, "sliding_attention": {**full, "rope_theta": 1e4}}
    with pytest.raises(ConfigError, match="rope_parameters differ from layer to layer"):
        spec_from_hf_config("m", {**plain, "rope_parameters": other})


def test_two_places_for_the_same_rule() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    spec = spec_from_hf_config("m", {**SMOLLM2, "rope_scaling": scaling, "rope_parameters": scaling})
    assert spec.rope_scaling == RopeScaling("linear", 2.0)
    with pytest.raises(ConfigError, match="rope_scaling and rope_parameters of"):
        spec_from_hf_config("m", {**SMOLLM2, "rope_scaling": scaling, "rope_parameters": {"rope_type": "default"}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("query_pre_attn_scale", 2.0),
        ("embedding_multiplier", 12.0),
        ("logits_scaling", 8.0),
        ("residual_multiplier", 0.22),
        ("logit_scale", 0.0625),
        ("use_qk_norm", True),
        ("qk_layernorm", True),
        ("moe_intermediate_size", 128),
        ("n_routed_experts", 8),
        ("attention_chunk_size", 8192),
        ("no_rope_layers", [1, 0]),
        ("nope_layer_interval", 4),
        ("rope_interleaved", True),
        ("rope_local_base_freq", 10000.0),
        ("mrope_section", [16, 24, 24]),
        ("attention_sink_size", 4),
        ("alibi", True),
        ("kv_lora_rank", 512),
        ("qkv_bias", True),
        ("lm_head_bias", True),
        ("use_bidirectional_attention", True),
        ("is_causal", False),
        ("num_kv_shared_layers", 2),
        ("hidden_size_per_layer_input", 256),
        ("position_embedding_type", "alibi"),
        ("norm_type", "layernorm"),
        ("quantization", {"bits": 4, "group_size": 64}),
        ("compression_config", {"format": "int-quantized"}),
        ("rotary_pct", 0.25),
        ("never_heard_of_experts", 3),
        ("some_new_scale", 0.5),
    ],
)
def test_a_key_that_tells_of_another_model_is_refused_by_its_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key} is .* would change the model"):
        spec_from_hf_config("m", {**SMOLLM2, key: value})


HARMLESS = {
    **{"torch_dtype": "bfloat16", "use_cache": True, "pretraining_tp": 1, "transformers_version": "4.50.0"},
    **{"initializer_range": 0.02, "attention_dropout": 0.0, "_name_or_path": "x", "unsloth_fixed": True},
    **{"use_mrope": False, "output_router_logits": False, "router_aux_loss_coef": 0.001, "rope_interleaved": False},
    **{"auto_map": {"AutoConfig": "a.B"}, "properties": {"scope": 1}, "task_specific_params": None, "logit_scale": 1.0},
    **{"num_experts": 0, "n_shared_experts": None, "attn_logit_softcapping": None, "hidden_act": "swish"},
    **{"keys_to_ignore_at_inference": ["past_key_values"], "max_window_layers": 21, "use_sliding_window": False},
}


@pytest.mark.parametrize("key", HARMLESS)
def test_keys_that_change_nothing(key: str) -> None:
    assert spec_from_hf_config("m", {**SMOLLM2, key: HARMLESS[key]}) == spec_from_hf_config("m", SMOLLM2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "gpt2", "architectures": None}, "gpt2"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_type is 'ntk'"),
        ({"rope_scaling": {"rope_type": "dynamic", "alpha": 1000.0}}, "alpha of the rotary scaling is 1000.0"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]}}, "mrope_section of the rotary"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 31}}, "short_factor has 31 numbers"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [0.0] * 32}}, "its numbers must be above 0"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": "x"}}, "short_factor is 'x'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 3}}, "truncate of the rotary scaling is 3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, "yarn needs one above 1"),
        ({"rope_scaling": "yarn"}, "the rotary scaling is 'yarn'"),
        ({"layer_types": ["linear_attention"] * 30}, "layer_types is"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types is"),
        ({"sliding_window": "4096"}, "sliding_window is '4096'"),
        ({**MISTRAL, "sliding_window": 0}, "sliding_window is 0"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of the rotary scaling is None"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"num_hidden_layers": "30"}, "num_hidden_layers is '30'"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
        ({"num_key_value_heads": 2}, "9 heads do not divide"),
        ({"head_dim": 63}, "head_dim is 63"),
        ({"vocab_size": True}, "vocab_size is True"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_from_hf_config("m", {**SMOLLM2, **changes})


def test_neutral_values_are_accepted() -> None:
    neutral = {"attention_bias": None, "num_experts": 0, "rope_scaling": {"rope_type": "default"}, "layer_types": None}
    assert spec_from_hf_config("m", {**SMOLLM2, **neutral}) == spec_from_hf_config("m", SMOLLM2)
    assert replace(spec_from_hf_config("n", SMOLLM2), name="m") == spec_from_hf_config("m", SMOLLM2)

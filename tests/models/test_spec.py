"""Model shapes out of config.json: what is read, and what is refused with the field's name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_files import hf_config
from tiny_models import CHANGES_BY_NAME, tiny_spec

from blendserve.errors import ConfigError
from blendserve.models.spec import RopeScaling, spec_from_hf_config

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
    mistral = {**SMOLLM2, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    expected = spec_from_hf_config("m", SMOLLM2)
    assert spec_from_hf_config("m", {**mistral, "sliding_window": None}) == expected
    assert spec_from_hf_config("m", {**mistral, "sliding_window": 8192}) == expected
    for window in (4096, 8191):
        with pytest.raises(ConfigError, match=f"sliding_window is {window}"):
            spec_from_hf_config("m", {**mistral, "sliding_window": window})


def test_qwen2_slides_only_where_it_is_told_to() -> None:
    qwen2 = {**hf_config(tiny_spec("qwen2")), "sliding_window": 128, "max_window_layers": 2}
    spec_from_hf_config("m", {**qwen2, "use_sliding_window": False})
    spec_from_hf_config("m", {**qwen2, "use_sliding_window": True, "max_window_layers": 3})
    for slides in ({"use_sliding_window": True}, {"layer_types": ["full_attention", "sliding_attention"]}):
        with pytest.raises(ConfigError, match="sliding_window is 128"):
            spec_from_hf_config("m", {**qwen2, **slides})


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
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
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

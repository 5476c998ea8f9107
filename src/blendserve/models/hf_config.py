"""A `ModelSpec` from a Hugging Face `config.json` (of transformers 4 or 5). What would change the model and is not
known here is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from blendserve.errors import ConfigError
from blendserve.models.hf_features import refuse_features, window_limit, window_of
from blendserve.models.hf_rope import read_rope
from blendserve.models.spec import Architecture, ModelSpec, brief, check_size, checked, token_ids

KNOWN_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Values of `architectures` in config.json that we run."""

_ARCHITECTURE_BY_MODEL_TYPE: dict[str, Architecture] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_MAX_DOUBLE = 1.7e308
_WORD_BY_KIND = {int: "a whole number", float: "a number", bool: "true or false"}
REMEDY = f"known architectures: {', '.join(KNOWN_ARCHITECTURES)}, with full attention and dense layers"


def spec_from_hf_config(name: str, config: Mapping[str, Any]) -> ModelSpec:
    """Read a `config.json`.

    Raises: ConfigError for an unknown architecture, a missing field, or a feature that would change the answer.
    """
    model_type = _model_type(name, config)
    read = partial(_field, name, config)
    num_layers, num_heads = read("num_hidden_layers", int), read("num_attention_heads", int)
    hidden_size, max_position = read("hidden_size", int), read("max_position_embeddings", int)
    check_size(name, "max_position", max_position)
    refuse_features(name, model_type, config, REMEDY)
    head_dim = read("head_dim", int, 128 if model_type == "qwen3" else hidden_size // max(num_heads, 1))
    rope = read_rope(name, config, max_position, REMEDY)
    window = window_of(name, model_type, config, num_layers, REMEDY)
    context_limit = rope.context_limit
    if window is not None and window < rope.max_position:
        context_limit = window_limit(window)
    return checked(
        ModelSpec(
            name=name,
            architecture=_ARCHITECTURE_BY_MODEL_TYPE[model_type],
            vocab_size=read("vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=read("intermediate_size", int),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=read("num_key_value_heads", int, num_heads if model_type == "llama" else None),
            head_dim=head_dim,
            max_position=rope.max_position if window is None else min(window, rope.max_position),
            rope_theta=rope.theta,
            rms_norm_eps=read("rms_norm_eps", float, 1e-6),
            rope_scaling=rope.scaling,
            has_tied_embeddings=read("tie_word_embeddings", bool, False),
            has_qkv_bias=model_type == "qwen2",
            has_qk_norm=model_type == "qwen3",
            eos_token_ids=token_ids(config.get("eos_token_id"), f"{name}'s config.json"),
            context_limit=context_limit,
        )
    )


def _model_type(name: str, config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or []
    listed = architectures if isinstance(architectures, list) else [architectures]
    model_type = str(config.get("model_type", ""))
    if model_type not in _ARCHITECTURE_BY_MODEL_TYPE or any(a not in KNOWN_ARCHITECTURES for a in listed):
        raise ConfigError(f"{name}: architecture {brief(architectures or model_type)} is not supported; {REMEDY}")
    return model_type


def _field(name: str, config: Mapping[str, Any], field: str, kind: type, default: Any = None) -> Any:
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{name}: config.json has no {field!r}, which its architecture needs")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and abs(value) <= _MAX_DOUBLE:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name}: {field} is {brief(value)} in config.json; it must be {_WORD_BY_KIND[kind]}")
    return value

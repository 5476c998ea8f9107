"""Settings of a `config.json` under which our forward pass would compute something else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from blendserve.errors import ConfigError
from blendserve.models.spec import brief, brief_name

_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
_NEUTRAL_BY_KEY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": _NOTHING,
    "quantization": _NOTHING,
    "compression_config": _NOTHING,
    "position_embedding_type": (None, "rope", "rotary"),
    "norm_type": (None, "rmsnorm", "rms_norm", "RMSNorm"),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "block_configs": _NOTHING,
    "layers_block_type": _NOTHING,
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "rotary_percent": (None, 1),
}
"""Values that leave the model as it is, of keys that may change it."""

_READ_ELSEWHERE = frozenset(
    (
        *("rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window"),
        *("max_window_layers", "original_max_position_embeddings"),
    )
)
_TELLING = re.compile(
    r"(^|_)(soft_?cap(ping)?|experts?|moe|windows?|rotary|m?rope|alibi|sinks?|bias|chunk(s|ed)?|nope|sparse|mamba|ssm"
    r"|qk_(layer)?norm|lora_rank|kv_shared|parallel_(attn|residual)|cross_attention|bidirectional|per_layer)(_|$)"
)
"""A key with one of these words that says anything changes the model, whoever made it."""
_SCALING = re.compile(r"(^|_)(multiplier|scale|scaling)(_|$)")
"""The same, but 1 says nothing."""
_WITHOUT_EFFECT = frozenset(("scale_attn_weights", "scale_attn_by_inverse_layer_idx"))
_ALWAYS_BIASED = {"qwen2": frozenset(("attention_bias", "qkv_bias"))}
"""Keys that say what these models do anyway."""

_FULL, _SLIDING = "full_attention", "sliding_attention"
_MISTRAL_WINDOW = 4096  # what transformers assumes where the field is absent
_FIRST_WINDOW_LAYER = 28  # what transformers assumes for Qwen where max_window_layers is absent


def refuse_features(name: str, model_type: str, config: Mapping[str, Any], remedy: str) -> None:
    """Raises: ConfigError naming the first setting that changes the model and is not supported."""
    for key, value in config.items():
        if key in _READ_ELSEWHERE or key in _ALWAYS_BIASED.get(model_type, ()):
            continue
        if changes_model(key, value):
            raise ConfigError(
                f"{name}: {brief_name(key)} is {brief(value)}, which is not supported and would change the model; "
                f"{remedy}"
            )


def changes_model(key: str, value: Any) -> bool:
    """Would a model with this setting compute something else, as far as its name tells?"""
    neutral = _neutral_values(key)
    if neutral is None:
        return False
    return not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)


def window_of(name: str, model_type: str, config: Mapping[str, Any], num_layers: int, remedy: str) -> int | None:
    """Positions that a layer attends to where that is less than all; the least of all layers. Raises: ConfigError."""
    kinds = _layer_types(name, config, num_layers, remedy)
    window = config.get("sliding_window", _MISTRAL_WINDOW if model_type == "mistral" else None)
    uses = config.get("use_sliding_window", model_type not in ("qwen2", "qwen3"))
    if not uses and model_type != "mistral":
        window = None
    if model_type in ("qwen2", "qwen3") and kinds is None:
        first = config.get("max_window_layers", _FIRST_WINDOW_LAYER)
        slides = not isinstance(first, int) or first < num_layers
    else:
        slides = kinds is None or _SLIDING in kinds
    if window is None or not slides:
        return None
    if type(window) is not int or window < 1:
        raise ConfigError(
            f"{name}: sliding_window is {brief(window)} in config.json; it must be a whole number from 1 up"
        )
    return window


def window_limit(window: int) -> str:
    """Why the context is no longer than a window."""
    return f"beyond them the model attends to the last {window} only (sliding window), which is not supported"


def _layer_types(name: str, config: Mapping[str, Any], num_layers: int, remedy: str) -> frozenset[str] | None:
    """The kinds of layers; None where the config does not say."""
    listed = config.get("layer_types")
    if not listed:
        return None
    if (
        not isinstance(listed, list)
        or any(kind not in (_FULL, _SLIDING) for kind in listed)
        or len(listed) != num_layers
    ):
        raise ConfigError(f"{name}: layer_types is {brief(listed)}, which is not supported; {remedy}")
    return frozenset(listed)


def _neutral_values(key: str) -> tuple[Any, ...] | None:
    """Values that change nothing; None where any does."""
    if key in _NEUTRAL_BY_KEY:
        return _NEUTRAL_BY_KEY[key]
    if key in _WITHOUT_EFFECT:
        return None
    if _TELLING.search(key.lower()):
        return _NOTHING
    return (*_NOTHING, 1) if _SCALING.search(key.lower()) else None

"""The shape of a model as one frozen value, read from a Hugging Face `config.json` or GGUF metadata.

Everything that depends on the architecture is decided here; weights, kernels and cost models only read fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from blendserve.config import KvDtype
from blendserve.errors import ConfigError

Architecture = Literal["llama", "qwen2", "qwen3"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Scaling of rotary frequencies: `linear` divides all by `factor`, `llama3` only the slow ones."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer of the Llama family: RMSNorm first, rotary positions, SwiGLU, grouped queries."""

    name: str
    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float
    rms_norm_eps: float
    rope_scaling: RopeScaling | None = None
    has_tied_embeddings: bool = False
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @property
    def kv_width(self) -> int:
        """Elements of K (or V) of one token in one layer."""
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, kv_dtype: KvDtype = "bf16") -> int:
        """Bytes of K and V of one token over all layers. In int8 each head has two scales of two bytes beside them."""
        bytes_per_head = 4 * self.head_dim if kv_dtype == "bf16" else 2 * self.head_dim + 4
        return self.num_layers * self.num_kv_heads * bytes_per_head

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of the matrices of one layer: what every token is multiplied by."""
        q_width = self.num_heads * self.head_dim
        attention = self.hidden_size * (q_width + 2 * self.kv_width) + q_width * self.hidden_size
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Parameters of all matrices, the embedding counted once where it is tied."""
        embedding = self.vocab_size * self.hidden_size
        return self.num_layers * self.num_layer_parameters + embedding * (1 if self.has_tied_embeddings else 2)


KNOWN_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Values of `architectures` in config.json that we run."""

_ARCHITECTURE_BY_MODEL_TYPE: dict[str, Architecture] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_layers": 1 << 12,
    "num_heads": 1 << 13,
    "num_kv_heads": 1 << 13,
    "head_dim": 1 << 12,
    "max_position": 1 << 24,
}
"""Ten times what the largest models have, or more: beyond it a file is damaged, or made to fill the memory."""
_MAX_THETA = 1e15
_MAX_SCALING = float(1 << 24)
_MAX_DOUBLE = 1.7e308
_MAX_SHOWN = 100
_WORD_BY_KIND = {int: "a whole number", float: "a number", bool: "true or false"}
_REMEDY = f"known architectures: {', '.join(KNOWN_ARCHITECTURES)}, with full attention and dense layers"


def spec_from_hf_config(name: str, config: Mapping[str, Any]) -> ModelSpec:
    """Read a Hugging Face `config.json` (of transformers 4 or 5).

    Raises: ConfigError for an unknown architecture, a missing field, or a feature that would change the answer.
    """
    model_type = _model_type(name, config)
    read = partial(_field, name, config)
    num_layers, num_heads = read("num_hidden_layers", int), read("num_attention_heads", int)
    hidden_size, max_position = read("hidden_size", int), read("max_position_embeddings", int)
    _refuse_features(name, model_type, config, num_layers, max_position)
    rope_theta, rope_scaling = _rope(name, config)
    head_dim = read("head_dim", int, 128 if model_type == "qwen3" else hidden_size // max(num_heads, 1))
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
            max_position=max_position,
            rope_theta=rope_theta,
            rms_norm_eps=read("rms_norm_eps", float, 1e-6),
            rope_scaling=rope_scaling,
            has_tied_embeddings=read("tie_word_embeddings", bool, False),
            has_qkv_bias=model_type == "qwen2",
            has_qk_norm=model_type == "qwen3",
            eos_token_ids=token_ids(config.get("eos_token_id")),
        )
    )


def token_ids(value: Any) -> tuple[int, ...]:
    """Read a config's eos_token_id, which may be absent, one id, or a list of them. Raises: ConfigError."""
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and 0 <= token_id < _MOST["vocab_size"] for token_id in listed):
        raise ConfigError(f"eos_token_id is {brief(value)}; it must be a token id, or a list of them")
    return tuple(listed)


def brief(value: object) -> str:
    """A value out of a file as a message quotes it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _model_type(name: str, config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or []
    listed = architectures if isinstance(architectures, list) else [architectures]
    model_type = str(config.get("model_type", ""))
    if model_type not in _ARCHITECTURE_BY_MODEL_TYPE or any(a not in KNOWN_ARCHITECTURES for a in listed):
        raise ConfigError(f"{name}: architecture {brief(architectures or model_type)} is not supported; {_REMEDY}")
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


def _refuse_features(name: str, model_type: str, config: Mapping[str, Any], num_layers: int, max_position: int) -> None:
    """Raise for every setting under which our forward pass would compute something else."""
    refused = {
        "attention_bias": bool(config.get("attention_bias")) and model_type != "qwen2",
        "mlp_bias": bool(config.get("mlp_bias")),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "num_experts": bool(config.get("num_experts")),
        "num_local_experts": bool(config.get("num_local_experts")),
        "quantization_config": bool(config.get("quantization_config")),
        "sliding_window": _slides(model_type, config, num_layers, max_position),
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise ConfigError(f"{name}: {field} is {brief(config.get(field))}, which is not supported; {_REMEDY}")


def _slides(model_type: str, config: Mapping[str, Any], num_layers: int, max_position: int) -> bool:
    """Does any layer attend to fewer positions than the context holds?"""
    if layer_types := config.get("layer_types"):
        return not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    if model_type == "mistral":
        window = config.get("sliding_window", 4096)  # what transformers assumes where the field is absent
        return window is not None and not (isinstance(window, int) and window >= max_position)
    full_layers = config.get("max_window_layers", 0)
    return bool(config.get("use_sliding_window")) and not (isinstance(full_layers, int) and full_layers >= num_layers)


def _rope(name: str, config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling; transformers 5 writes both into `rope_parameters`, older ones apart."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"{name}: the rotary scaling is {brief(parameters)} in config.json; it must be an object")
    holder = parameters if parameters.get("rope_theta") is not None else config
    theta = _field(name, holder, "rope_theta", float, 10000.0)
    rotary_share = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if rotary_share != 1.0:
        raise ConfigError(f"{name}: partial_rotary_factor is {brief(rotary_share)}, which is not supported; {_REMEDY}")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _rope_number(name, parameters, "factor"))
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor, low, high, original = (_rope_number(name, parameters, key) for key in keys)
        return theta, RopeScaling("llama3", factor, low, high, int(original))
    raise ConfigError(f"{name}: rope_type is {brief(kind)}, which is not supported; known: default, linear, llama3")


def _rope_number(name: str, parameters: Mapping[str, Any], key: str) -> float:
    value = parameters.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= _MAX_SCALING:
        raise ConfigError(
            f"{name}: {key} of the rotary scaling is {brief(value)}; it must be above 0 and at most {_MAX_SCALING:g}"
        )
    return float(value)


def checked(spec: ModelSpec) -> ModelSpec:
    """The spec itself. Raises: ConfigError when a number is beyond any model, or when two contradict one another."""
    for field, most in _MOST.items():
        if not 1 <= getattr(spec, field) <= most:
            raise ConfigError(f"{spec.name}: {field} is {brief(getattr(spec, field))}; it must be from 1 to {most}")
    if not 0 < spec.rope_theta <= _MAX_THETA:
        raise ConfigError(f"{spec.name}: rope_theta is {spec.rope_theta}; it must be above 0, at most {_MAX_THETA:g}")
    if not 0 <= spec.rms_norm_eps <= 1:
        raise ConfigError(f"{spec.name}: rms_norm_eps is {spec.rms_norm_eps}; it must be from 0 to 1")
    if spec.num_heads % spec.num_kv_heads:
        raise ConfigError(f"{spec.name}: {spec.num_heads} heads do not divide evenly by {spec.num_kv_heads} KV heads")
    if spec.head_dim % 2:
        raise ConfigError(f"{spec.name}: head_dim is {spec.head_dim}; rotary positions need an even one")
    scaling = spec.rope_scaling
    if scaling is not None and not scaling.low_freq_factor < scaling.high_freq_factor:
        raise ConfigError(
            f"{spec.name}: low_freq_factor is {scaling.low_freq_factor}; it must be below high_freq_factor, "
            f"{scaling.high_freq_factor}"
        )
    return spec

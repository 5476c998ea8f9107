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


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Read a config's token id field, which may be absent, one id, or a list of them."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _model_type(name: str, config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or []
    model_type = str(config.get("model_type", ""))
    if model_type not in _ARCHITECTURE_BY_MODEL_TYPE or any(a not in KNOWN_ARCHITECTURES for a in architectures):
        raise ConfigError(f"{name}: architecture {architectures or model_type!r} is not supported; {_REMEDY}")
    return model_type


def _field(name: str, config: Mapping[str, Any], field: str, kind: type, default: Any = None) -> Any:
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{name}: config.json has no {field!r}, which its architecture needs")
    if kind is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name}: {field} is {value!r} in config.json; it must be {kind.__name__}")
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
            raise ConfigError(f"{name}: {field} is {config.get(field)!r}, which is not supported; {_REMEDY}")


def _slides(model_type: str, config: Mapping[str, Any], num_layers: int, max_position: int) -> bool:
    """Does any layer attend to fewer positions than the context holds?"""
    if layer_types := config.get("layer_types"):
        return any(kind != "full_attention" for kind in layer_types)
    if model_type == "mistral":
        window = config.get("sliding_window", 4096)  # what transformers assumes where the field is absent
        return window is not None and window < max_position
    return bool(config.get("use_sliding_window")) and config.get("max_window_layers", 0) < num_layers


def _rope(name: str, config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling; transformers 5 writes both into `rope_parameters`, older ones apart."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    rotary_share = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if rotary_share != 1.0:
        raise ConfigError(f"{name}: partial_rotary_factor is {rotary_share}, which is not supported; {_REMEDY}")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _rope_number(name, parameters, "factor"))
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor, low, high, original = (_rope_number(name, parameters, key) for key in keys)
        return theta, RopeScaling("llama3", factor, low, high, int(original))
    raise ConfigError(f"{name}: rope_type is {kind!r}, which is not supported; known: default, linear, llama3")


def _rope_number(name: str, parameters: Mapping[str, Any], key: str) -> float:
    value = parameters.get(key)
    if not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{name}: {key} of the rotary scaling is {value!r}; it must be a positive number")
    return float(value)


def checked(spec: ModelSpec) -> ModelSpec:
    """The spec itself. Raises: ConfigError when its sizes contradict one another."""
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    ):
        if getattr(spec, field) < 1:
            raise ConfigError(f"{spec.name}: {field} is {getattr(spec, field)}; it must be at least 1")
    if spec.num_heads % spec.num_kv_heads:
        raise ConfigError(f"{spec.name}: {spec.num_heads} heads do not divide evenly by {spec.num_kv_heads} KV heads")
    if spec.head_dim % 2:
        raise ConfigError(f"{spec.name}: head_dim is {spec.head_dim}; rotary positions need an even one")
    return spec

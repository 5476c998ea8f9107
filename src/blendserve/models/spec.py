"""The shape of a model as one frozen value. `hf_config` and `gguf_spec` read it from files; weights, kernels and cost
models only read its fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from blendserve.config import KvDtype
from blendserve.errors import ConfigError

Architecture = Literal["llama", "qwen2", "qwen3"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Scaling of rotary frequencies: `linear` divides all by `factor`, `llama3` only the slow ones, `yarn` along a ramp
    between two numbers of turns over the original context, `longrope` each by its own of `divisors`.

    Cosines and sines are multiplied by `attention_factor`. `truncates`: yarn's ramp begins and ends at whole pairs.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer of the Llama family: RMSNorm first, rotary positions, SwiGLU, grouped queries.

    `context_limit` says why `max_position` is less than what the files say; it is empty where it is not.
    """

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
    context_limit: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the context."""
        if not self.context_limit:
            return ()
        return (f"A prompt and its answer have at most {self.max_position} tokens: {self.context_limit}.",)

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
MAX_SCALING = float(1 << 24)
_MAX_SHOWN = 100


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """Read the eos_token_id of a file, which may be absent, one id, or a list of them. Raises: ConfigError."""
    listed = [] if value is None else value if isinstance(value, list) else [value]
    whole = [int(item) if isinstance(item, float) and item.is_integer() else item for item in listed]
    if not all(type(token_id) is int and 0 <= token_id < _MOST["vocab_size"] for token_id in whole):
        raise ConfigError(f"eos_token_id is {brief(value)} in {where}; it must be a token id, or a list of them")
    return tuple(whole)


def brief_name(name: str) -> str:
    """A name out of a file, such as a key or a tensor's, as a message says it: on one line, cut where it is long."""
    return (name if name.isprintable() else repr(name)[1:-1])[:_MAX_SHOWN]


def brief(value: object) -> str:
    """A value out of a file as a message quotes it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def checked(spec: ModelSpec) -> ModelSpec:
    """The spec itself. Raises: ConfigError when a number is beyond any model, or when two contradict one another."""
    for field in _MOST:
        check_size(spec.name, field, getattr(spec, field))
    if not 0 < spec.rope_theta <= _MAX_THETA:
        raise ConfigError(f"{spec.name}: rope_theta is {spec.rope_theta}; it must be above 0, at most {_MAX_THETA:g}")
    if not 0 <= spec.rms_norm_eps <= 1:
        raise ConfigError(f"{spec.name}: rms_norm_eps is {spec.rms_norm_eps}; it must be from 0 to 1")
    if spec.num_heads % spec.num_kv_heads:
        raise ConfigError(f"{spec.name}: {spec.num_heads} heads do not divide evenly by {spec.num_kv_heads} KV heads")
    if spec.head_dim % 2:
        raise ConfigError(f"{spec.name}: head_dim is {spec.head_dim}; rotary positions need an even one")
    if spec.rope_scaling is not None:
        _check_scaling(spec.name, spec.head_dim, spec.rope_scaling)
    return spec


def check_size(name: str, field: str, value: int) -> None:
    """Raises: ConfigError when no model has so much of it."""
    if not 1 <= value <= _MOST[field]:
        raise ConfigError(f"{name}: {field} is {brief(value)}; it must be from 1 to {_MOST[field]}")


def _check_scaling(name: str, head_dim: int, scaling: RopeScaling) -> None:
    if not scaling.low_freq_factor < scaling.high_freq_factor:
        raise ConfigError(
            f"{name}: low_freq_factor is {scaling.low_freq_factor}; it must be below high_freq_factor, "
            f"{scaling.high_freq_factor}"
        )
    if not 0 < scaling.attention_factor <= MAX_SCALING:
        raise ConfigError(
            f"{name}: attention_factor is {scaling.attention_factor}; it must be above 0, at most {MAX_SCALING:g}"
        )
    if scaling.kind == "longrope" and len(scaling.divisors) != head_dim // 2:
        raise ConfigError(
            f"{name}: short_factor has {len(scaling.divisors)} numbers; it must have {head_dim // 2}, half of the head "
            "dimension"
        )
    if not all(0 < divisor <= MAX_SCALING and math.isfinite(divisor) for divisor in scaling.divisors):
        raise ConfigError(f"{name}: short_factor is {brief(scaling.divisors)}; its numbers must be above 0")

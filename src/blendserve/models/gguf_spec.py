"""A `ModelSpec` from the metadata of a GGUF file (llama.cpp's key names)."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from blendserve.errors import ConfigError
from blendserve.models.gguf_dequantize import dequantize
from blendserve.models.gguf_file import GgufFile
from blendserve.models.hf_features import changes_model, window_limit
from blendserve.models.hf_rope import yarn_mscale
from blendserve.models.rope import frequency_divisors
from blendserve.models.spec import (
    MAX_SCALING,
    Architecture,
    ModelSpec,
    RopeScaling,
    brief,
    brief_name,
    checked,
    token_ids,
)

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_REQUIRED = object()
_READ_KEYS = frozenset(
    (
        *("rope.freq_base", "rope.dimension_count", "rope.scale_linear", "attention.sliding_window"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
        *("rope.scaling.finetuned", "rope.scaling.attn_factor"),
    )
)
"""Keys whose names tell of a change of the model, and that are read."""
_FACTORS_TENSOR = "rope_freqs.weight"
_LOW_FACTOR, _HIGH_FACTOR, _DEFAULT_ORIGINAL = 1.0, 4.0, 8192
_FACTOR_TOLERANCE = 1e-4  # the factors are stored as float32 ratios, computed in float32


def spec_from_gguf(name: str, file: GgufFile) -> ModelSpec:
    """Read the metadata of a GGUF file.

    Raises: ConfigError for an unknown architecture, a missing key, or a feature that would change the answer.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{name}: GGUF architecture {brief(architecture)} is not supported; known architectures: "
            f"{', '.join(_ARCHITECTURES)} (Mistral is exported as llama), with full attention and dense layers"
        )
    keys = _Keys(name, architecture, file.metadata)
    num_heads, hidden_size = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden_size // max(num_heads, 1))
    _refuse_features(keys, head_dim)
    rope_theta = keys.decimal("rope.freq_base", 10000.0)
    max_position, window = keys.integer("context_length"), keys.integer("attention.sliding_window", 0)
    scaling = _rope_scaling(keys, file, rope_theta, head_dim, max_position)
    if scaling is not None and scaling.kind == "yarn":
        max_position = max(max_position, int(scaling.original_max_position * scaling.factor))
    return checked(
        ModelSpec(
            name=name,
            architecture=cast(Architecture, architecture),
            vocab_size=_vocab_size(name, file),
            hidden_size=hidden_size,
            intermediate_size=keys.integer("feed_forward_length"),
            num_layers=keys.integer("block_count"),
            num_heads=num_heads,
            num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            max_position=max_position if not window else min(window, max_position),
            rope_theta=rope_theta,
            rms_norm_eps=keys.decimal("attention.layer_norm_rms_epsilon"),
            rope_scaling=scaling,
            has_tied_embeddings="output.weight" not in file.tensor_by_name,
            has_qkv_bias=architecture == "qwen2",
            has_qk_norm=architecture == "qwen3",
            eos_token_ids=token_ids(file.metadata.get("tokenizer.ggml.eos_token_id"), f"the metadata of {name}"),
            context_limit=window_limit(window) if window and window < max_position else "",
        )
    )


class _Keys:
    """Reads `{architecture}.KEY` of the metadata."""

    def __init__(self, name: str, architecture: str, metadata: dict[str, Any]) -> None:
        self.name, self.architecture, self._metadata = name, architecture, metadata

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if value is _REQUIRED:
            raise ConfigError(f"{self.name}: the GGUF metadata lacks '{self.architecture}.{key}'; download it again")
        return value

    def others(self) -> list[tuple[str, Any]]:
        """Keys of the architecture that nothing here reads, and their values."""
        prefix = f"{self.architecture}."
        found = [(key.removeprefix(prefix), value) for key, value in self._metadata.items() if key.startswith(prefix)]
        return [(key, value) for key, value in found if key not in _READ_KEYS]

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        value = self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one entry per layer, all alike
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{self.name}: '{self.architecture}.{key}' is {brief(value)}; one integer is supported")
        return value

    def decimal(self, key: str, default: Any = _REQUIRED) -> float:
        """A float32 of the file as the decimal that it was written from: 9.99999975e-06 is 1e-05."""
        return float(f"{self.number(key, default):.7g}")

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{self.name}: '{self.architecture}.{key}' is {brief(value)}; it must be a number")
        return float(value)


def _refuse_features(keys: _Keys, head_dim: int) -> None:
    """Raise for every setting under which our forward pass would compute something else."""
    supported = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }
    for key, value in supported.items():
        found = keys.get(key, value)
        if found != value:
            raise ConfigError(f"{keys.name}: '{keys.architecture}.{key}' is {brief(found)}; only {value} is supported")
    for key, found in keys.others():
        if changes_model(key.replace(".", "_"), found):
            raise ConfigError(
                f"{keys.name}: '{keys.architecture}.{brief_name(key)}' is {brief(found)}, which is not supported "
                "and would change the model"
            )


def _vocab_size(name: str, file: GgufFile) -> int:
    embedding = file.tensor_by_name.get("token_embd.weight")
    if embedding is None:
        raise ConfigError(f"{name}: the GGUF file has no tensor 'token_embd.weight'; is it a whole model?")
    return embedding.shape[0]


def _rope_scaling(
    keys: _Keys, file: GgufFile, rope_theta: float, head_dim: int, max_position: int
) -> RopeScaling | None:
    factors = file.tensor_by_name.get(_FACTORS_TENSOR)
    if factors is not None:
        stored = dequantize(file.tensor_bytes(factors), factors.kind).reshape(-1).astype(np.float64)
        return _llama3_scaling(keys.name, stored, rope_theta, head_dim)
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind not in ("linear", "yarn") or not 0 < factor <= MAX_SCALING:
        raise ConfigError(
            f"{keys.name}: rotary scaling {brief(kind)} by {factor} is not supported; known: linear, llama3, yarn"
        )
    if kind == "linear":
        return RopeScaling("linear", factor)
    original = keys.integer("rope.scaling.original_context_length", max_position)
    attention = keys.number("rope.scaling.attn_factor", 1.0) * yarn_mscale(factor)
    if not 1 <= original <= MAX_SCALING or not rope_theta > 1:
        raise ConfigError(
            f"{keys.name}: yarn over an original context of {original} tokens with the base {rope_theta} is not "
            "supported; both must be above 1"
        )
    return RopeScaling("yarn", factor, original_max_position=original, attention_factor=attention)


def _llama3_scaling(name: str, factors: NDArray[np.float64], rope_theta: float, head_dim: int) -> RopeScaling | None:
    """The llama3 rule that gives these divisors: llama.cpp stores the divisors, not the rule.

    Low and high factors are 1 and 4 in every released Llama 3; the original context follows from a divisor that lies
    between the two ends. Divisors that this does not give back are refused.
    """
    if not 0 < rope_theta < math.inf or head_dim < 2 or not np.isfinite(factors).all() or factors.min(initial=1.0) <= 0:
        raise ConfigError(f"{name}: the rotary factors in {_FACTORS_TENSOR!r} are damaged; download the model again")
    plain = rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    largest = float(factors.max(initial=1.0))
    if largest == 1.0:
        return None
    original = _DEFAULT_ORIGINAL
    is_whole = factors.shape == plain.shape
    between = np.flatnonzero((factors > 1.0) & (factors < largest))
    if is_whole and len(between):
        slow_share = (1.0 - 1.0 / factors[between[0]]) / (1.0 - 1.0 / largest)
        turns = _HIGH_FACTOR - slow_share * (_HIGH_FACTOR - _LOW_FACTOR)
        original = round(turns * 2.0 * math.pi / plain[between[0]])
    scaling = RopeScaling("llama3", largest, _LOW_FACTOR, _HIGH_FACTOR, original)
    if factors.shape == plain.shape and np.allclose(
        frequency_divisors(plain, scaling, rope_theta), factors, _FACTOR_TOLERANCE, 0.0
    ):
        return scaling
    raise ConfigError(
        f"{name}: the rotary factors in {_FACTORS_TENSOR!r} {list(factors.shape)} do not follow the llama3 rule; "
        "use the model's safetensors directory, whose config.json states its rule"
    )

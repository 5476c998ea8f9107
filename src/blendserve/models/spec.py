"""The shape of a model as one frozen value, read from a Hugging Face `config.json` or GGUF metadata.

Everything that depends on the architecture is decided here; weights, kernels and cost models only read fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Architecture = Literal["llama", "qwen2", "qwen3"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Scaling of rotary frequencies: `linear` divides all by `factor`; `llama3` only the slow ones (config.json names)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer of the Llama family: pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

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
    bos_token_id: int | None = None

    @property
    def kv_width(self) -> int:
        """Elements of K (or V) of one token in one layer."""
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.num_layers * self.kv_width * bytes_per_element

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


def spec_from_hf_config(name: str, config: Mapping[str, Any]) -> ModelSpec:
    """Read a Hugging Face `config.json`. Raises: ConfigError for an unknown architecture or a missing field."""
    raise NotImplementedError

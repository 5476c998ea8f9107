"""Weights of a model, tensor by tensor, under the project's own names whatever file they come from.

Names: `embed_tokens`, `norm`, `lm_head` (absent where embeddings are tied) and, under `layers.{i}.`, `input_norm`,
`q_proj`, `k_proj`, `v_proj`, `o_proj`, `post_attention_norm`, `gate_proj`, `up_proj`, `down_proj`, `q_norm`, `k_norm`;
biases are the matrix's name and `.bias`. Matrices are [outputs, inputs], rotary halves are Hugging Face's (half-split).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from blendserve.errors import ConfigError
from blendserve.models.spec import ModelSpec, brief_name

Floats = NDArray[np.float32]
_MAX_SHOWN = 200


class Weights(Protocol):
    """Loads one tensor at a time; what is returned belongs to the caller, nothing is cached.

    Raises: ConfigError when the tensor is missing or unreadable.
    """

    @property
    def shape_by_name(self) -> Mapping[str, tuple[int, ...]]: ...
    def tensor(self, name: str, /) -> Floats: ...


class MemoryWeights:
    """Weights that are already float32 arrays: tiny models of tests, or tensors made by a program."""

    def __init__(self, tensor_by_name: Mapping[str, Floats]) -> None:
        self._tensor_by_name = tensor_by_name

    @property
    def shape_by_name(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensor_by_name.items()}

    def tensor(self, name: str, /) -> Floats:
        if name not in self._tensor_by_name:
            raise ConfigError(
                f"the model's files have no tensor {name!r}, only {len(self._tensor_by_name)} others; download it again"
            )
        return np.ascontiguousarray(self._tensor_by_name[name], dtype=np.float32)


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this spec has, in the order of the forward pass."""
    hidden, q_width, kv_width = spec.hidden_size, spec.num_heads * spec.head_dim, spec.kv_width
    layer: dict[str, tuple[int, ...]] = {
        "input_norm": (hidden,),
        "q_proj": (q_width, hidden),
        "k_proj": (kv_width, hidden),
        "v_proj": (kv_width, hidden),
        "o_proj": (hidden, q_width),
        "post_attention_norm": (hidden,),
        "gate_proj": (spec.intermediate_size, hidden),
        "up_proj": (spec.intermediate_size, hidden),
        "down_proj": (hidden, spec.intermediate_size),
    }
    if spec.has_qkv_bias:
        layer |= {"q_proj.bias": (q_width,), "k_proj.bias": (kv_width,), "v_proj.bias": (kv_width,)}
    if spec.has_qk_norm:
        layer |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (spec.vocab_size, hidden)}
    for index in range(spec.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["norm"] = (hidden,)
    if not spec.has_tied_embeddings:
        shapes["lm_head"] = (spec.vocab_size, hidden)
    return shapes


def check_weights(spec: ModelSpec, weights: Weights) -> None:
    """Compare the tensors that are there with those the spec asks for; no data is read.

    Raises: ConfigError that names every missing, unexpected or misshaped tensor (the first few of each).
    """
    expected, found = expected_shapes(spec), weights.shape_by_name
    problems = [f"{name} is missing, expected {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [
        f"{brief_name(name)} {list(shape)} is unexpected" for name, shape in found.items() if name not in expected
    ]
    problems += [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        shown = "; ".join(problem[:_MAX_SHOWN] for problem in problems[:5]) + (
            f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        )
        raise ConfigError(f"weights of {spec.name!r} do not fit its {spec.architecture} configuration: {shown}")


def round_to_bf16(values: Floats) -> Floats:
    """Round to the nearest bfloat16 (ties to even) and return it as float32: the rounding of the native engine."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), values, rounded.view(np.float32))

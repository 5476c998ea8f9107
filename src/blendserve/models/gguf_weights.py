"""Weights from a GGUF file, dequantised tensor by tensor.

llama.cpp stores the rows of Llama's q and k projections so that rotary pairs are neighbours; they are put back into
the half-split order that the rest of the project uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from blendserve.errors import ConfigError
from blendserve.models.gguf_dequantize import Bytes, dequantize
from blendserve.models.gguf_file import GgufFile, GgufTensor
from blendserve.models.spec import ModelSpec
from blendserve.models.weights import Floats

_NAME_BY_STEM = {
    "attn_norm": "input_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "ffn_norm": "post_attention_norm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
_TOP_NAMES = {"token_embd.weight": "embed_tokens", "output_norm.weight": "norm", "output.weight": "lm_head"}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_NOT_WEIGHTS = ("rope_freqs.weight",)  # read into the spec


class GgufWeights:
    """Weights of one GGUF file under the project's names.

    Raises: ConfigError when a tensor is missing.
    """

    def __init__(self, file: GgufFile, spec: ModelSpec) -> None:
        self._file = file
        self._num_heads_by_stem = {}
        if spec.architecture == "llama":
            self._num_heads_by_stem = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}
        self._tensor_by_name: dict[str, GgufTensor] = {
            _our_name(name): tensor for name, tensor in file.tensor_by_name.items() if name not in _NOT_WEIGHTS
        }

    @property
    def shape_by_name(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensor_by_name.items()}

    def tensor(self, name: str, /) -> Floats:
        tensor = self._tensor_by_name.get(name)
        if tensor is None:
            raise ConfigError(
                f"the model's files have no tensor {name!r}, only {len(self._tensor_by_name)} others; download it again"
            )
        stored = self._file.tensor_bytes(tensor)
        if num_heads := self._num_heads_by_stem.get(name.rpartition(".")[2]):
            stored = _half_split_rows(stored, num_heads)
        return dequantize(stored, tensor.kind).reshape(tensor.shape)


def _half_split_rows(stored: Bytes, num_heads: int) -> Bytes:
    """Rows x0 y0 x1 y1 ... of every head become x0 x1 ... y0 y1 ...; rows are whole numbers of blocks."""
    pairs = stored.reshape(num_heads, -1, 2, stored.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(stored.shape)


def _our_name(name: str) -> str:
    """The project's name of a tensor, or the given one where it has none."""
    if match := _LAYER_NAME.fullmatch(name):
        layer, stem, kind = match.groups()
        if stem in _NAME_BY_STEM:
            return f"layers.{layer}.{_NAME_BY_STEM[stem]}" + (".bias" if kind == "bias" else "")
    return _TOP_NAMES.get(name, name)

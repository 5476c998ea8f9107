"""The C++ core as Python sees it: packed weights, a model, steps. Arrays are C-contiguous; shapes as in csrc/shape.h
and csrc/weights.h.

Raises: ValueError for arrays, sizes or plans that do not fit.
"""

from collections.abc import Callable
from enum import Enum

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]
_Int32s = NDArray[np.int32]

BLOCK_SIZE: int
"""Tokens of a KV block."""

DEFAULT_OVERLAP: dict[str, float]
"""Settings of `OverlapOptions` where nothing was measured, by name; all but the mode."""

def best_isa() -> str:
    """The best instruction set of this processor: "portable", "avx2", "avxvnni", "avx512vnni" or "avx512bf16"."""

def op_names() -> list[str]: ...
def is_supported(isa: str) -> bool:
    """May kernels of this instruction set run here?"""

class WeightLoader:
    """Weights on their way from files to a `Model`, which takes them away. `dtype` is "bf16" or "int8"; where
    `embedding` is None it is read from the head."""

    def __init__(self, isa: str, dtype: str, num_layers: int) -> None: ...
    def set_layer(
        self,
        index: int,
        *,
        qkv: _Floats,
        output: _Floats,
        gate_up: _Floats,
        down: _Floats,
        input_norm: _Floats,
        post_attention_norm: _Floats,
        qkv_bias: _Floats | None = None,
        q_norm: _Floats | None = None,
        k_norm: _Floats | None = None,
    ) -> None: ...
    def set_ends(
        self,
        *,
        embedding: _Floats | None,
        lm_head: _Floats,
        norm: _Floats,
        inverse_frequencies: NDArray[np.float64],
        rotary_factor: float = 1.0,
    ) -> None: ...

class ModelShape:
    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rms_norm_eps: float,
    ) -> None: ...
    @property
    def head_stride(self) -> int: ...

class ModelLimits:
    """`kv_dtype` of keys and values is "bf16" or "int8"."""

    def __init__(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, num_blocks: int, kv_dtype: str
    ) -> None: ...

class SamplingParams:
    """`num_logprobs` -1: none; `stop_token_ids`: every token that `min_tokens` bans."""

    def __init__(
        self,
        *,
        temperature: float,
        top_p: float,
        min_p: float,
        presence_penalty: float,
        frequency_penalty: float,
        repetition_penalty: float,
        top_k: int,
        num_logprobs: int,
        min_tokens: int,
        num_prompt_tokens: int,
        seed: int,
        logit_bias: list[tuple[int, float]],
        stop_token_ids: list[int],
        allowed_token_ids: list[int],
        bad_words: list[list[int]],
    ) -> None: ...

class Pooling(Enum):
    none = 0
    last = 1
    mean = 2

class PromptParams:
    """What a request wants of its prompt; `num_logprobs` -1: none."""

    def __init__(self, *, num_prompt_tokens: int, num_logprobs: int, pooling: Pooling) -> None: ...

class OverlapMode(Enum):
    off = 0
    on = 1
    auto = 2

class OverlapOptions:
    """When and how steps run as two nano-batches; csrc/overlap.h says what each number means."""

    def __init__(
        self,
        mode: OverlapMode,
        *,
        chunk_bytes: int,
        tile_flop: int,
        iteration_bytes: int,
        memory_lanes: int,
        gemm_flop_per_s: float,
        attention_flop_per_s: float,
        kv_bytes_per_s: float,
        weight_bytes_per_s: float,
        compute_delay: float,
        memory_delay: float,
    ) -> None: ...

class Model:
    """Takes its weights out of the loader. Not to be used from two threads at once; the GIL is free during a step."""

    def __init__(self, weights: WeightLoader, shape: ModelShape, limits: ModelLimits, *, num_threads: int) -> None: ...
    def set_overlap(self, options: OverlapOptions) -> None:
        """From the next step on."""

    def admit(self, slot: int, params: SamplingParams, prompt: PromptParams = ...) -> None: ...
    def release(self, slot: int) -> None: ...
    def forward(
        self,
        slots: _Int32s,
        num_scheduled_tokens: _Int32s,
        num_computed_tokens: _Int32s,
        is_sampled: NDArray[np.bool_],
        token_ids: _Int32s,
        block_tables: _Int32s,
    ) -> int:
        """Run a step up to the rows that are sampled; `sample` must follow. Returns: how many rows these are."""

    def sample(
        self,
        mask_rows: _Int32s | None = None,
        masks: _Int32s | None = None,
        refused: Callable[[int, _Int32s], tuple[_Int32s, _Int32s] | None] | None = None,
    ) -> tuple[_Int32s, list[tuple[int, float, list[tuple[int, float]]]]]:
        """Sampled tokens and, for entries that asked, (position among them, logprob, best alternatives).

        Row i is sampled among the tokens whose bits are set in `masks`[`mask_rows`[i]], among all where that is -1.
        `refused` is asked about tokens of rows that follow each other, from the given one on; rows to which it gives
        masks of the same kind are sampled again. They had none before, and no allowed tokens. Raises what it raises.
        Shapes: `mask_rows` [number of rows], `masks` [any, at least vocab_size / 32].
        """

    def prompt_logprobs(self, slot: int, blocks: _Int32s) -> tuple[_Floats, _Int32s, _Floats]:
        """Of every token of a slot's prompt: log probability, best alternatives (-1: none) and theirs. Shapes: [n],
        [n, k], [n, k]."""

    def pooled(self, slot: int, blocks: _Int32s) -> _Floats: ...
    def logits(self, token_ids: _Int32s) -> _Floats: ...
    def start_trace(self) -> None:
        """Forget recorded spans, and record them from now on."""

    def stop_trace(self) -> None: ...
    def spans(self) -> NDArray[np.int64]:
        """What workers did since `start_trace`, int64[number of spans, 7]: worker, op (index into `op_names`), layer
        (-1 outside of layers), nano_batch, begin_ns, end_ns, busy_ns."""

    def counters(self) -> dict[str, float | dict[str, float]]: ...
    @property
    def isa(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def kv_dtype(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def num_weight_bytes(self) -> int: ...
    @property
    def num_kv_bytes(self) -> int: ...
    @property
    def num_workspace_bytes(self) -> int: ...

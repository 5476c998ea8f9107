"""The native executor: hands a step's arrays to the C++ core and brings its tokens back.

Loading fuses and pads matrices for the core, a few layers at a time; no float32 copy outlives its layer.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blendserve.config import BLOCK_SIZE, Dtype, EngineConfig, KvDtype
from blendserve.costs.hardware import Peaks
from blendserve.costs.step_cost import OverlapCost
from blendserve.engine.step import Int32s, PromptResult, StepPlan, StepResult
from blendserve.errors import CapacityError, ConfigError, ExecutorError
from blendserve.executors.prompt_results import embedding_of, kept_with, token_logprobs
from blendserve.executors.sampling import BadWordLookup, no_bad_words
from blendserve.executors.trace import StepTrace
from blendserve.host import usable_cores
from blendserve.models.pooling import LAST_TOKEN, Pooling
from blendserve.models.rope import attention_factor, inverse_frequencies
from blendserve.models.spec import ModelSpec
from blendserve.models.weights import Weights, check_weights
from blendserve.request import Request, TokenIds, TokenLogprob

try:
    from blendserve import _native
except ImportError as error:
    raise ConfigError(
        "this installation has no native engine (it was made without the compiled core): use --engine http or --engine "
        "vllm, or install again with a C++20 compiler and without BLENDSERVE_NATIVE=OFF"
    ) from error

Floats = NDArray[np.float32]

_MAX_LOADING_THREADS = 4  # each holds a layer in float32

KERNEL_REVISION = 2
"""Raised when a change of the kernels changes tokens: a journal begun by other kernels is not continued."""


def best_isa() -> str:
    """The best instruction set of this processor."""
    return _native.best_isa()


def op_names() -> tuple[str, ...]:
    """Names of the operations that a trace counts, by their numbers."""
    return tuple(_native.op_names())


@dataclass(frozen=True, slots=True)
class NativeCounters:
    """Work since the executor was made. `weight_bytes` and `kv_bytes` are what memory must deliver at least."""

    num_steps: int
    num_overlapped_steps: int
    num_tokens: int
    matmul_flop: float
    attention_flop: float
    weight_bytes: float
    kv_bytes: float
    seconds_by_op: dict[str, float]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory that the executor took. KV blocks and buffers occupy it only once they are written."""

    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


class NativeExecutor:
    """Runs steps on this machine's CPU. `config` gives the largest step, the longest sequence, the threads and the
    precisions of weights and of KV; `isa` is "auto" or a name that `_native.is_supported` accepts.

    `overlap_cost` tells steps in which overlap pays where `config.overlap` is "auto": none where it is None.
    `bad_words` gives the token sequences of words.

    `compute_s` and `memory_s` of a step are its work at the rates of `peaks`: all arithmetic of matrix products and
    attention, and what has to come from memory (weights once, KV once per sequence or shared prefix). Over its
    `elapsed_s` they are the shares of the two peaks that it reached; 0 without peaks. `trace` notes when steps ran.

    Mutates: its KV memory and the table of admitted requests. Raises: ConfigError for weights or an instruction set
    that do not fit, CapacityError where the memory cannot be had.
    """

    needs_tokens = True
    block_size = BLOCK_SIZE

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        config: EngineConfig,
        *,
        num_blocks: int,
        isa: str = "auto",
        peaks: Peaks | None = None,
        trace: StepTrace | None = None,
        overlap_cost: OverlapCost | None = None,
        pooling: Pooling = LAST_TOKEN,
        bad_words: BadWordLookup = no_bad_words,
    ) -> None:
        self.num_blocks = num_blocks
        self._vocab_size = spec.vocab_size
        self._bad_words = bad_words
        self._dtype, self._kv_dtype = config.dtype, config.kv_dtype
        self.eos_token_ids = spec.eos_token_ids
        self._peaks = peaks
        self._trace = trace
        self._pooling = pooling
        self._request_by_slot: dict[int, Request] = {}
        self._flop = self._bytes = 0.0
        limits = _native.ModelLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len or spec.max_position,
            num_blocks=num_blocks,
            kv_dtype=config.kv_dtype,
        )
        num_threads = config.num_threads or usable_cores()
        try:
            loader = _packed_weights(
                spec, weights, _native.best_isa() if isa == "auto" else isa, config.dtype, num_threads
            )
            self._model = _native.Model(loader, _shape(spec), limits, num_threads=num_threads)
            self.set_overlap(config.overlap, overlap_cost or OverlapCost())
        except ValueError as error:
            raise ConfigError(f"the native executor cannot run {spec.name!r}: {error}") from error
        except MemoryError as error:
            raise CapacityError(
                f"no memory for {num_blocks} KV blocks of {spec.name!r} beside its weights; lower --kv-memory"
            ) from error

    @property
    def isa(self) -> str:
        return self._model.isa

    @property
    def dtype(self) -> Dtype:
        return self._dtype

    @property
    def kv_dtype(self) -> KvDtype:
        return self._kv_dtype

    @property
    def num_threads(self) -> int:
        return self._model.num_threads

    @property
    def memory(self) -> MemoryUse:
        """Weights, KV blocks and the buffers of a step."""
        return MemoryUse(self._model.num_weight_bytes, self._model.num_kv_bytes, self._model.num_workspace_bytes)

    def set_overlap(self, mode: str, cost: OverlapCost) -> None:
        """From the next step on: `mode` is one of `config.OVERLAP_MODES`. Changes time, never tokens."""
        modes = {"off": _native.OverlapMode.off, "on": _native.OverlapMode.on, "auto": _native.OverlapMode.auto}
        options = _native.OverlapOptions(
            modes[mode],
            chunk_bytes=cost.chunk_bytes,
            tile_flop=cost.tile_flop,
            iteration_bytes=cost.iteration_bytes,
            memory_lanes=cost.memory_lanes,
            gemm_flop_per_s=cost.gemm_flop_per_s,
            attention_flop_per_s=cost.attention_flop_per_s,
            kv_bytes_per_s=cost.kv_bytes_per_s,
            weight_bytes_per_s=cost.weight_bytes_per_s,
            compute_delay=cost.interference.compute_delay,
            memory_delay=cost.interference.memory_delay,
        )
        self._model.set_overlap(options)

    def set_peaks(self, peaks: Peaks) -> None:
        """From the next step on, `compute_s` and `memory_s` are at these rates."""
        self._peaks = peaks

    def admit(self, slot: int, request: Request) -> None:
        words = self._bad_words(request.sampling.bad_words)
        possible = [list(word) for word in words if max(word) < self._vocab_size]
        self._model.admit(slot, _sampling_params(request, self.eos_token_ids, possible), self._prompt_params(request))
        if request.embedding is not None or request.sampling.prompt_logprobs is not None:
            self._request_by_slot[slot] = request

    def release(self, slot: int) -> None:
        self._model.release(slot)
        self._request_by_slot.pop(slot, None)

    def kept_with(self, request: Request) -> Hashable | None:
        return kept_with(request, self._pooling)

    def prompt_result(self, slot: int, blocks: Int32s) -> PromptResult:
        request = self._request_by_slot[slot]
        if request.embedding is not None:
            pooled = self._model.pooled(slot, blocks)
            return PromptResult(embedding=embedding_of(pooled, request.embedding, self._pooling))
        found = self._model.prompt_logprobs(slot, blocks)
        return PromptResult(token_logprobs(request.prompt_token_ids, *found))

    def _prompt_params(self, request: Request) -> _native.PromptParams:
        kind = "none" if request.embedding is None else self._pooling.kind
        num_logprobs = request.sampling.prompt_logprobs
        return _native.PromptParams(
            num_prompt_tokens=request.num_prompt_tokens,
            num_logprobs=-1 if num_logprobs is None else num_logprobs,
            pooling=_native.Pooling[kind],
        )

    def execute(self, plan: StepPlan) -> StepResult:
        trace = self._trace
        has_spans = trace is not None and trace.wants_spans
        if has_spans:
            self._model.start_trace()
        started = time.perf_counter()
        try:
            self._model.forward(
                plan.slots,
                plan.num_scheduled_tokens,
                plan.num_computed_tokens,
                plan.is_sampled,
                plan.token_ids,
                plan.block_tables,
            )
            masks = plan.masks
            token_ids, logprobs = (
                self._model.sample()
                if masks is None
                else self._model.sample(masks.row_of, masks.words(), masks.refused)
            )
        except (ValueError, TypeError) as error:
            raise ExecutorError(
                f"the native engine could not run a step of {len(plan.slots)} requests: {error}"
            ) from error
        logprob_by_position = {
            position: TokenLogprob(int(token_ids[position]), logprob, tuple(top)) for position, logprob, top in logprobs
        }
        ended = time.perf_counter()
        if trace is not None:
            trace.add(started, ended, self._model.spans() if has_spans else None)
        if has_spans:
            self._model.stop_trace()
        compute_s, memory_s = self._resource_s()
        return StepResult(token_ids, ended - started, logprob_by_position, compute_s, memory_s)

    def _resource_s(self) -> tuple[float, float]:
        """Work since the last step at peak rates."""
        if self._peaks is None:
            return 0.0, 0.0
        counters = self.counters()
        flop = counters.matmul_flop + counters.attention_flop
        num_bytes = counters.weight_bytes + counters.kv_bytes
        spent = (flop - self._flop) / self._peaks.flop_per_s, (num_bytes - self._bytes) / self._peaks.bytes_per_s
        self._flop, self._bytes = flop, num_bytes
        return spent

    def logits(self, token_ids: TokenIds) -> Floats:
        """Logits after every token of one sequence, apart from all steps. Shapes: [n] -> [n, vocab_size]."""
        return self._model.logits(np.ascontiguousarray(token_ids, dtype=np.int32))

    def counters(self) -> NativeCounters:
        values = self._model.counters()
        seconds_by_op = values.pop("op_s")
        return NativeCounters(**values, seconds_by_op=seconds_by_op)  # type: ignore[arg-type]

    def close(self) -> None:
        """Free weights and KV memory; the executor is of no use afterwards. Closing it again does nothing."""
        if hasattr(self, "_model"):
            del self._model


def _sampling_params(
    request: Request, eos_token_ids: tuple[int, ...], bad_words: list[list[int]]
) -> _native.SamplingParams:
    sampling = request.sampling
    return _native.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        top_k=max(sampling.top_k, 0),
        num_logprobs=-1 if sampling.logprobs is None else sampling.logprobs,
        min_tokens=sampling.min_tokens,
        num_prompt_tokens=request.num_prompt_tokens,
        seed=request.seed & 0xFFFF_FFFF_FFFF_FFFF,
        logit_bias=list(sampling.logit_bias.items()),
        stop_token_ids=[*sampling.stop_token_ids, *eos_token_ids],
        allowed_token_ids=list(sampling.allowed_token_ids or ()),
        bad_words=bad_words,
    )


def _shape(spec: ModelSpec) -> _native.ModelShape:
    return _native.ModelShape(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
    )


def _packed_weights(
    spec: ModelSpec, weights: Weights, isa: str, dtype: Dtype, num_threads: int
) -> _native.WeightLoader:
    check_weights(spec, weights)
    loader = _native.WeightLoader(isa, dtype, spec.num_layers)
    head_stride = _shape(spec).head_stride
    with ThreadPoolExecutor(min(num_threads, _MAX_LOADING_THREADS)) as pool:
        ends = pool.submit(_load_ends, loader, spec, weights, dtype)
        layers = [
            pool.submit(_load_layer, loader, spec, weights, index, head_stride) for index in range(spec.num_layers)
        ]
        for loaded in (ends, *layers):
            loaded.result()
    return loader


def _load_ends(loader: _native.WeightLoader, spec: ModelSpec, weights: Weights, dtype: Dtype) -> None:
    # What enters the first layer stays bfloat16: reading one row of it per token is no work.
    reads_head = spec.has_tied_embeddings and dtype == "bf16"
    loader.set_ends(
        embedding=None if reads_head else weights.tensor("embed_tokens"),
        lm_head=weights.tensor("embed_tokens" if spec.has_tied_embeddings else "lm_head"),
        norm=weights.tensor("norm"),
        inverse_frequencies=inverse_frequencies(spec),
        rotary_factor=attention_factor(spec),
    )


def _load_layer(loader: _native.WeightLoader, spec: ModelSpec, weights: Weights, index: int, head_stride: int) -> None:
    def tensor(name: str) -> Floats:
        return weights.tensor(f"layers.{index}.{name}")

    def heads(suffix: str = "") -> Floats:
        parts = [tensor(f"{name}_proj{suffix}") for name in ("q", "k", "v")]
        return np.concatenate([_pad_heads(part, spec.head_dim, head_stride) for part in parts])

    output = _pad_heads(np.ascontiguousarray(tensor("o_proj").T), spec.head_dim, head_stride)
    loader.set_layer(
        index,
        qkv=heads(),
        output=np.ascontiguousarray(output.T),
        gate_up=np.concatenate([tensor("gate_proj"), tensor("up_proj")]),
        down=tensor("down_proj"),
        input_norm=tensor("input_norm"),
        post_attention_norm=tensor("post_attention_norm"),
        qkv_bias=heads(".bias") if spec.has_qkv_bias else None,
        q_norm=tensor("q_norm") if spec.has_qk_norm else None,
        k_norm=tensor("k_norm") if spec.has_qk_norm else None,
    )


def _pad_heads(values: Floats, head_dim: int, head_stride: int) -> Floats:
    """Put zeros after the rows of every head. Shapes: [heads * head_dim, ...] -> [heads * head_stride, ...]."""
    if head_dim == head_stride:
        return values
    by_head = values.reshape(-1, head_dim, *values.shape[1:])
    padding = [(0, 0), (0, head_stride - head_dim), *[(0, 0)] * (values.ndim - 1)]
    return np.pad(by_head, padding).reshape(-1, *values.shape[1:])

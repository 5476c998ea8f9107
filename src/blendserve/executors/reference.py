"""The executable specification of the model, in NumPy: what the native core must compute, written to be read.

It runs steps like any executor, one sequence after another and one layer after another, with its own paged KV arrays.
Slow on purpose; for tests, for tiny models and for settling arguments.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from blendserve.config import BLOCK_SIZE, KvDtype
from blendserve.engine.step import Int32s, PromptResult, StepPlan, StepResult
from blendserve.errors import ConfigError
from blendserve.executors.int8_kv import CHUNK_TOKENS, Int8KvCache, attend_by_floats, attend_by_integers
from blendserve.executors.prompt_results import embedding_of, kept_with
from blendserve.executors.sampling import BadWordLookup, masked, no_bad_words, sample, token_logprob
from blendserve.models.int8 import Int8Rows, int8_activations, int8_product, int8_weights
from blendserve.models.pooling import LAST_TOKEN, Pooling
from blendserve.models.rope import attention_factor, inverse_frequencies
from blendserve.models.spec import ModelSpec
from blendserve.models.weights import Weights, expected_shapes, round_to_bf16
from blendserve.request import Request, TokenLogprob

Array = NDArray[np.floating[Any]]
Precision = Literal["float64", "float32", "bf16", "int8"]
"""Of weights, activations and KV; `bf16` rounds weights and KV as the native core does and computes in float32; `int8`
does so but for matrix products, whose weights and activations are integers."""

_BF16_KV: tuple[Precision, ...] = ("bf16", "int8")


@dataclass(slots=True)
class ReferenceModel:
    """Weights in memory and the forward pass over them.

    `has_bf16_products` rounds both factors of every product to bfloat16, as the native core's kernels for AVX512-BF16
    do: activations that meet bfloat16 weights, queries, and weights of attention. `kv_dtype` "int8" rounds KV to
    integers whatever the precision is; `has_integer_attention` says that queries and weights of attention then meet
    them as integers too, as on AVX512-VNNI. Mutates: the KV arrays that it is given, nothing of its own.
    """

    spec: ModelSpec
    weights: Weights
    precision: Precision = "float32"
    has_bf16_products: bool = False
    kv_dtype: KvDtype = "bf16"
    has_integer_attention: bool = False
    _tensor_by_name: dict[str, Array] = field(init=False, repr=False)
    _int8_by_name: dict[str, Int8Rows] = field(init=False, repr=False)
    _inverse_frequencies: NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._inverse_frequencies = inverse_frequencies(self.spec)
        shape_by_name = expected_shapes(self.spec)
        self._tensor_by_name = {name: self._loaded(name) for name in shape_by_name}
        self._int8_by_name = {
            name: int8_weights(self.weights.tensor(name))
            for name, shape in shape_by_name.items()
            if self.precision == "int8" and len(shape) == 2
        }

    @property
    def dtype(self) -> type[np.float32] | type[np.float64]:
        return np.float64 if self.precision == "float64" else np.float32

    def _loaded(self, name: str) -> Array:
        tensor = self.weights.tensor(name)
        is_matrix = tensor.ndim == 2
        is_rounded = is_matrix and self.precision in _BF16_KV
        return (round_to_bf16(tensor) if is_rounded else tensor).astype(self.dtype)

    def hidden_states(self, token_ids: Int32s, first_position: int, cache: AnyKvCache, blocks: Int32s) -> Array:
        """Run tokens [first_position, first_position + n) of one sequence through all layers.

        Shapes: `token_ids` [n] -> [n, hidden_size], after the final norm. Mutates: `cache`, in the sequence's `blocks`.
        """
        hidden = self._tensor_by_name["embed_tokens"][token_ids]
        positions = first_position + np.arange(len(token_ids))
        for layer in range(self.spec.num_layers):
            name = f"layers.{layer}."
            attended = self._attention(layer, self._norm(hidden, name + "input_norm"), positions, cache, blocks)
            hidden = hidden + attended
            hidden = hidden + self._mlp(name, self._norm(hidden, name + "post_attention_norm"))
        return self._norm(hidden, "norm")

    def logits(self, hidden: Array) -> NDArray[np.float64]:
        """Shapes: [n, hidden_size] -> [n, vocab_size]."""
        head = "embed_tokens" if self.spec.has_tied_embeddings else "lm_head"
        return np.asarray(self._linear(hidden, head), dtype=np.float64)

    def _attention(
        self, layer: int, x: Array, positions: NDArray[np.int64], cache: AnyKvCache, blocks: Int32s
    ) -> Array:
        spec, name = self.spec, f"layers.{layer}."
        queries = self._linear(x, name + "q_proj").reshape(len(x), spec.num_heads, spec.head_dim)
        keys = self._linear(x, name + "k_proj").reshape(len(x), spec.num_kv_heads, spec.head_dim)
        values = self._linear(x, name + "v_proj").reshape(len(x), spec.num_kv_heads, spec.head_dim)
        if spec.has_qk_norm:
            queries, keys = self._norm(queries, name + "q_norm"), self._norm(keys, name + "k_norm")
        cache.write(layer, blocks, positions, self._rotated(keys, positions), values)

        num_tokens = int(positions[-1]) + 1
        grouped = self._rotated(queries, positions).reshape(len(x), spec.num_kv_heads, -1, spec.head_dim)
        grouped = grouped / np.sqrt(self.dtype(spec.head_dim))
        is_future = np.arange(num_tokens) > positions[:, None]
        mixed: Array
        if isinstance(cache, Int8KvCache):
            attend = attend_by_integers if self.has_integer_attention else attend_by_floats
            mixed = attend(grouped, cache.read(layer, blocks, num_tokens), is_future).astype(self.dtype)
        else:
            mix = self._mixed_in_chunks if self.has_bf16_products else self._mixed
            mixed = mix(grouped, *cache.read(layer, blocks, num_tokens), is_future)
        return self._linear(mixed.reshape(len(x), -1), name + "o_proj")

    def _mixed(self, queries: Array, keys: Array, values: Array, is_future: NDArray[np.bool_]) -> Array:
        """Shapes: `queries` [n, kv_heads, group, head_dim], keys and values [m, kv_heads, head_dim], `is_future`
        [n, m] -> as the queries."""
        scores = np.einsum("nhgd,mhd->hgnm", queries, keys)
        scores = np.where(is_future, self.dtype(-np.inf), scores)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares = shares / shares.sum(axis=-1, keepdims=True)
        mixed: Array = np.einsum("hgnm,mhd->nhgd", shares, values)
        return mixed

    def _mixed_in_chunks(self, queries: Array, keys: Array, values: Array, is_future: NDArray[np.bool_]) -> Array:
        """The same with rounded factors. Weights are rounded relative to the largest score up to the end of their
        chunk, so they depend on where chunks begin."""
        powers_of_two = round_to_bf16((queries * np.log2(np.e)).astype(np.float32))
        scores = np.einsum("nhgd,mhd->nhgm", powers_of_two, keys)
        scores = np.where(is_future[:, None, None, :], self.dtype(-np.inf), scores)
        largest = np.full((*queries.shape[:-1], 1), -np.inf, dtype=self.dtype)
        total, mixed = np.zeros_like(largest), np.zeros_like(queries)
        for begin in range(0, len(keys), CHUNK_TOKENS):
            chunk = slice(begin, begin + CHUNK_TOKENS)
            larger = np.maximum(largest, scores[..., chunk].max(axis=-1, keepdims=True))
            weights = round_to_bf16(np.exp2(scores[..., chunk] - larger))
            decay, largest = np.exp2(largest - larger), larger
            total = total * decay + weights.sum(axis=-1, keepdims=True)
            mixed = mixed * decay + np.einsum("nhgm,mhd->nhgd", weights, values[chunk])
        return mixed / total

    def _mlp(self, name: str, x: Array) -> Array:
        gate = self._linear(x, name + "gate_proj")
        activated = gate / (1.0 + np.exp(-gate))
        return self._linear(activated * self._linear(x, name + "up_proj"), name + "down_proj")

    def _linear(self, x: Array, name: str) -> Array:
        if self.precision == "int8":
            product: Array = int8_product(int8_activations(x.astype(np.float32)), self._int8_by_name[name])
        else:
            inputs = round_to_bf16(x.astype(np.float32)) if self.has_bf16_products else x
            product = inputs @ self._tensor_by_name[name].T
        bias = self._tensor_by_name.get(f"{name}.bias")
        return product if bias is None else product + bias

    def _norm(self, x: Array, name: str) -> Array:
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
        scale = self.dtype(1.0) / np.sqrt(mean_square + self.dtype(self.spec.rms_norm_eps))
        normed: Array = x * scale * self._tensor_by_name[name]
        return normed

    def _rotated(self, x: Array, positions: NDArray[np.int64]) -> Array:
        """Turn pair (j, j + head_dim / 2) of every head by frequency times position. Shapes: [n, heads, head_dim]."""
        angles = (positions[:, None] * self._inverse_frequencies)[:, None, :]
        factor = attention_factor(self.spec)
        cosines: Array = (factor * np.cos(angles)).astype(self.dtype)
        sines: Array = (factor * np.sin(angles)).astype(self.dtype)
        half = self.spec.head_dim // 2
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)


class KvCache:
    """K (rotated) and V of every layer, in blocks. Shapes: [num_layers, num_blocks, block_size, kv_heads, head_dim]."""

    def __init__(self, spec: ModelSpec, num_blocks: int, block_size: int, precision: Precision) -> None:
        shape = (spec.num_layers, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        dtype = np.float64 if precision == "float64" else np.float32
        self._precision, self._block_size = precision, block_size
        self._keys: Array = np.full(shape, np.nan, dtype=dtype)  # reading what was never written shows
        self._values: Array = np.full(shape, np.nan, dtype=dtype)

    def write(self, layer: int, blocks: Int32s, positions: NDArray[np.int64], keys: Array, values: Array) -> None:
        """Store rows for these positions. Shapes: `keys`, `values` [n, kv_heads, head_dim]. Mutates: this."""
        if self._precision in _BF16_KV:
            keys, values = round_to_bf16(keys.astype(np.float32)), round_to_bf16(values.astype(np.float32))
        at = blocks[positions // self._block_size], positions % self._block_size
        self._keys[layer][at], self._values[layer][at] = keys, values

    def read(self, layer: int, blocks: Int32s, num_tokens: int) -> tuple[Array, Array]:
        """Rows of positions [0, num_tokens). Shapes: two of [num_tokens, kv_heads, head_dim]."""
        positions = np.arange(num_tokens)
        at = blocks[positions // self._block_size], positions % self._block_size
        return self._keys[layer][at], self._values[layer][at]


AnyKvCache = KvCache | Int8KvCache


def kv_cache(model: ReferenceModel, num_blocks: int, block_size: int = BLOCK_SIZE) -> AnyKvCache:
    """KV arrays of a model, of its precision."""
    if model.kv_dtype == "int8":
        return Int8KvCache(model.spec, num_blocks, block_size)
    return KvCache(model.spec, num_blocks, block_size, model.precision)


class ReferenceExecutor:
    """Runs steps with a `ReferenceModel`.

    Mutates: its KV arrays and the table of admitted requests.
    """

    needs_tokens = True

    def __init__(
        self,
        model: ReferenceModel,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        pooling: Pooling = LAST_TOKEN,
        bad_words: BadWordLookup = no_bad_words,
    ) -> None:
        if num_blocks < 1:
            raise ConfigError(f"num_blocks is {num_blocks}; it must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.eos_token_ids = model.spec.eos_token_ids
        self._model = model
        self._bad_words = bad_words
        self._cache = kv_cache(model, num_blocks, block_size)
        self._request_by_slot: dict[int, Request] = {}
        self._pooling = pooling
        self._has_run: set[int] = set()
        self._last_state_by_slot: dict[int, Array] = {}
        self._state_sum_by_block: dict[int, NDArray[np.float64]] = {}
        self._last_state_by_block: dict[int, Array] = {}
        self._logprob_by_place: dict[tuple[int, int], TokenLogprob] = {}

    def admit(self, slot: int, request: Request) -> None:
        self._request_by_slot[slot] = request
        self._has_run.discard(slot)

    def kept_with(self, request: Request) -> Hashable | None:
        return kept_with(request, self._pooling)

    def prompt_result(self, slot: int, blocks: Int32s) -> PromptResult:
        request = self._request_by_slot[slot]
        count = request.num_prompt_tokens
        if request.embedding is None:
            places = [(int(blocks[at // self.block_size]), at % self.block_size) for at in range(1, count)]
            return PromptResult((None, *(self._logprob_by_place[place] for place in places)))
        pooled = self._last_state_by_slot.get(slot)
        if self._pooling.kind == "mean":
            used = blocks[: -(-count // self.block_size)].tolist()
            pooled = np.sum([self._state_sum_by_block[block] for block in used], axis=0) / count
        assert pooled is not None, "an embedding before its prompt was computed"
        return PromptResult(embedding=embedding_of(pooled, request.embedding, self._pooling))

    def release(self, slot: int) -> None:
        del self._request_by_slot[slot]

    def close(self) -> None:
        self._request_by_slot.clear()

    def execute(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        tokens: list[int] = []
        logprobs: dict[int, TokenLogprob] = {}
        masks, words = plan.masks, None if plan.masks is None else plan.masks.words()
        for entry, slot in enumerate(plan.slots.tolist()):
            begin = int(plan.num_computed_tokens[entry])
            end = begin + int(plan.num_scheduled_tokens[entry])
            blocks = plan.block_tables[slot]
            hidden = self._model.hidden_states(plan.token_ids[slot, begin:end], begin, self._cache, blocks)
            self._keep_prompt(slot, hidden, begin, blocks)
            if not plan.is_sampled[entry]:
                continue
            request = self._request_by_slot[slot]
            logits = self._model.logits(hidden[-1:])[0]
            if masks is not None and words is not None and masks.row_of[len(tokens)] >= 0:
                logits = masked(logits, words[masks.row_of[len(tokens)]])
            bad_words = self._bad_words(request.sampling.bad_words)
            output_ids = plan.token_ids[slot, request.num_prompt_tokens : end]
            token = sample(logits, request, output_ids, self.eos_token_ids, bad_words)
            again = masks.refused(len(tokens), np.array([token], np.int32)) if masks and masks.refused else None
            if again is not None:
                logits = masked(logits, again[1][again[0][0]])
                token = sample(logits, request, output_ids, self.eos_token_ids, bad_words)
            if request.sampling.logprobs is not None:
                logprobs[len(tokens)] = token_logprob(logits, token, request.sampling.logprobs)
            tokens.append(token)
        return StepResult(np.array(tokens, dtype=np.int32), time.perf_counter() - started, logprobs)

    def _keep_prompt(self, slot: int, hidden: Array, begin: int, blocks: Int32s) -> None:
        """Keep what a request asked of its prompt with the blocks of the tokens that it is about."""
        request, size = self._request_by_slot[slot], self.block_size
        count = request.num_prompt_tokens
        num_top = request.sampling.prompt_logprobs
        if num_top is None and request.embedding is None:
            return
        if num_top is not None and slot not in self._has_run and 0 < begin < count:
            self._score(request, begin, self._last_state_by_block[int(blocks[begin // size - 1])], blocks, num_top)
        self._has_run.add(slot)
        for position, state in enumerate(hidden[: max(count - begin, 0)], start=begin):
            block = int(blocks[position // size])
            if position % size == 0:
                self._state_sum_by_block[block] = np.zeros(len(state))
            if block in self._state_sum_by_block:
                self._state_sum_by_block[block] = self._state_sum_by_block[block] + state
            self._last_state_by_slot[slot] = self._last_state_by_block[block] = state
            if num_top is not None and position + 1 < count:
                self._score(request, position + 1, state, blocks, num_top)

    def _score(self, request: Request, target: int, state: Array, blocks: Int32s, num_top: int) -> None:
        logits = self._model.logits(state[None])[0]
        place = int(blocks[target // self.block_size]), target % self.block_size
        self._logprob_by_place[place] = token_logprob(logits, int(request.prompt_token_ids[target]), num_top)


def prompt_logits(model: ReferenceModel, token_ids: Int32s) -> NDArray[np.float64]:
    """Logits after every token of one sequence, for comparisons. Shapes: [n] -> [n, vocab_size]."""
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    cache = kv_cache(model, num_blocks)
    return model.logits(model.hidden_states(token_ids, 0, cache, np.arange(num_blocks, dtype=np.int32)))

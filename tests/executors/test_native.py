"""The native executor against the NumPy specification, and bit for bit against itself under any schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import CHANGES_BY_NAME, random_tokens, random_weights, tiny_spec

from blendserve import _native
from blendserve.config import Dtype, EngineConfig, KvDtype
from blendserve.costs.step_cost import Interference, OverlapCost
from blendserve.engine.step import Executor, StepPlan
from blendserve.errors import ConfigError, ExecutorError
from blendserve.executors.native import NativeExecutor
from blendserve.executors.reference import Precision, ReferenceExecutor, ReferenceModel, prompt_logits
from blendserve.executors.sampling import sample, token_logprob
from blendserve.models.spec import ModelSpec
from blendserve.models.weights import MemoryWeights
from blendserve.request import Request, SamplingParams, TokenIds, TokenLogprob

MAX_LEN = 256
BLOCKS_EACH = MAX_LEN // 16
NUM_SLOTS = 4
NUM_BLOCKS = NUM_SLOTS * BLOCKS_EACH
ISAS = [isa for isa in ("portable", "avx2", "avx512bf16") if _native.is_supported(isa)]
INT8_ISAS = [isa for isa in ("portable", "avx2", "avxvnni", "avx512vnni", "avx512bf16") if _native.is_supported(isa)]
PRODUCTS: list[tuple[Dtype, str]] = [*(("bf16", isa) for isa in ISAS), *(("int8", isa) for isa in INT8_ISAS)]
KERNELS: list[tuple[Dtype, KvDtype, str]] = [
    *((dtype, "bf16", isa) for dtype, isa in PRODUCTS),
    *((dtype, "int8", isa) for dtype, isa in PRODUCTS),
]
ROUNDING_ISAS = ("avx512bf16",)
"""Their bfloat16 products take activations in bfloat16 too."""
INTEGER_ATTENTION_ISAS = ("avx512vnni", "avx512bf16")
"""Their attention over KV in int8 multiplies integers."""
LENGTHS = (150, 5, 16, 67)


def native(
    spec: ModelSpec,
    *,
    dtype: Dtype = "bf16",
    kv_dtype: KvDtype = "bf16",
    isa: str = "auto",
    num_threads: int = 2,
    max_tokens: int = 64,
) -> NativeExecutor:
    config = EngineConfig(
        max_num_seqs=NUM_SLOTS,
        max_num_batched_tokens=max_tokens,
        max_model_len=MAX_LEN,
        num_threads=num_threads,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    return NativeExecutor(spec, random_weights(spec), config, num_blocks=NUM_BLOCKS, isa=isa, bad_words=token_sequences)


def token_sequences(words: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Words that are written as the numbers of their tokens."""
    return [tuple(map(int, word.split())) for word in words]


def specification(
    spec: ModelSpec, precision: Precision = "bf16", isa: str = "portable", kv_dtype: KvDtype = "bf16"
) -> ReferenceModel:
    """What the kernels of an instruction set must compute, rounded where they round."""
    return ReferenceModel(
        spec,
        random_weights(spec),
        precision,
        has_bf16_products=isa in ROUNDING_ISAS,
        kv_dtype=kv_dtype,
        has_integer_attention=isa in INTEGER_ATTENTION_ISAS,
    )


def possible_sequences(words: tuple[str, ...]) -> list[tuple[int, ...]]:
    return [word for word in token_sequences(words) if max(word) < tiny_spec().vocab_size]


def requests_of(spec: ModelSpec, **sampling: Any) -> list[Request]:
    params = SamplingParams(**sampling)
    prompts = [random_tokens(spec, length, seed=length) for length in LENGTHS]
    return [Request(i, ids, len(ids), params, 40, seed=-1 - i) for i, ids in enumerate(prompts)]


class Table:
    """The arrays of a plan, and steps made by hand."""

    def __init__(self, executor: Executor, requests: list[Request]) -> None:
        self.executor = executor
        self.tokens = np.zeros((NUM_SLOTS, MAX_LEN), dtype=np.int32)
        order = np.random.default_rng(7).permutation(NUM_BLOCKS)
        self.blocks = order.astype(np.int32).reshape(NUM_SLOTS, BLOCKS_EACH)
        self.computed = np.zeros(NUM_SLOTS, dtype=np.int32)
        self.known = np.zeros(NUM_SLOTS, dtype=np.int32)
        self.logprobs: dict[int, list[TokenLogprob]] = {slot: [] for slot in range(NUM_SLOTS)}
        for slot, request in enumerate(requests):
            self.tokens[slot, : request.num_prompt_tokens] = request.prompt_token_ids
            self.known[slot] = request.num_prompt_tokens
            executor.admit(slot, request)

    def step(self, num_tokens_by_slot: dict[int, int]) -> None:
        slots = np.array(list(num_tokens_by_slot), dtype=np.int32)
        counts = np.array(list(num_tokens_by_slot.values()), dtype=np.int32)
        is_sampled = self.computed[slots] + counts == self.known[slots]
        plan = StepPlan(slots, counts, self.computed[slots], is_sampled, self.tokens, self.blocks, int(counts.sum()), 0)
        result = self.executor.execute(plan)
        self.computed[slots] += counts
        for i, slot in enumerate(slots[is_sampled].tolist()):
            self.tokens[slot, self.known[slot]] = result.token_ids[i]
            self.known[slot] += 1
            if i in result.logprobs:
                self.logprobs[slot].append(result.logprobs[i])

    def prefill(self, slot: int, chunk: int) -> None:
        while self.computed[slot] < LENGTHS[slot]:
            self.step({slot: min(chunk, LENGTHS[slot] - int(self.computed[slot]))})

    def run(self, num_outputs: int, chunk: int = 64) -> list[list[int]]:
        """Prefill one after the other, then decode together."""
        for slot in range(NUM_SLOTS):
            self.prefill(slot, chunk)
        for _ in range(num_outputs - 1):
            self.step(dict.fromkeys(range(NUM_SLOTS), 1))
        return self.outputs(num_outputs)

    def outputs(self, count: int) -> list[list[int]]:
        rows = zip(self.tokens, LENGTHS, strict=True)
        return [row[length : length + count].tolist() for row, length in rows]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CHANGES_BY_NAME)
def test_logits_are_those_of_the_specification(name: str, isa: str) -> None:
    """Sums in another order may move logits by a quarter, at most, of what rounding to bfloat16 moves them by."""
    spec = tiny_spec(name)
    assert_logits_are_specified(spec, random_tokens(spec, 150), isa)


def assert_logits_are_specified(spec: ModelSpec, tokens: TokenIds, isa: str) -> None:
    if isa in ROUNDING_ISAS:
        return assert_rounded_logits_are_specified(spec, tokens, isa, "bf16")
    rounded = prompt_logits(specification(spec, "bf16", isa), tokens)
    exact = prompt_logits(specification(spec, "float64"), tokens)
    logits = native(spec, isa=isa).logits(tokens)
    assert root_mean_square(logits - rounded) <= 0.25 * root_mean_square(rounded - exact)
    return None


def assert_rounded_logits_are_specified(
    spec: ModelSpec, tokens: TokenIds, isa: str, dtype: Dtype, kv_dtype: KvDtype = "bf16"
) -> None:
    """For kernels that round their inputs. In one layer a tenth of the rows, at least, agree to the last bits; a
    twentieth where KV is rounded to integers, one of which moves all rows from its token on.

    In the others a sum in another order brought an activation or a KV element to the neighbouring number, which moves
    all that follows; in all layers by less than rounding does.
    """
    share = 0.1 if kv_dtype == "bf16" else 0.05
    for layers in (replace(spec, num_layers=1), spec):
        expected = prompt_logits(specification(layers, dtype, isa, kv_dtype), tokens)
        exact = prompt_logits(specification(layers, "float64"), tokens)
        logits = native(layers, dtype=dtype, kv_dtype=kv_dtype, isa=isa).logits(tokens)
        change = root_mean_square(expected - exact)
        assert root_mean_square(logits - expected) <= change <= 0.2 * root_mean_square(exact)
        if layers.num_layers == 1:
            assert np.quantile(np.abs(logits - expected).max(axis=1), share) <= 0.001 * change


@pytest.mark.parametrize("isa", INT8_ISAS)
@pytest.mark.parametrize("name", CHANGES_BY_NAME)
def test_int8_logits_are_those_of_the_specification(name: str, isa: str) -> None:
    spec = tiny_spec(name)
    assert_rounded_logits_are_specified(spec, random_tokens(spec, 150), isa, "int8")


@pytest.mark.parametrize(("dtype", "isa"), PRODUCTS)
@pytest.mark.parametrize("name", CHANGES_BY_NAME)
def test_logits_over_an_int8_kv_cache_are_those_of_the_specification(name: str, dtype: Dtype, isa: str) -> None:
    spec = tiny_spec(name)
    assert_rounded_logits_are_specified(spec, random_tokens(spec, 150), isa, dtype, "int8")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [10, 72, 80, 96, 128])
def test_an_int8_kv_cache_of_heads_that_need_padding_or_a_tail_of_columns(head_dim: int, isa: str) -> None:
    spec = tiny_spec("qwen3", head_dim=head_dim, has_qkv_bias=True, num_heads=4, num_kv_heads=2, num_layers=2)
    assert_rounded_logits_are_specified(spec, random_tokens(spec, 70), isa, "bf16", "int8")


def root_mean_square(values: NDArray[np.floating[Any]]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [10, 72, 80, 96, 128])
def test_head_sizes_that_need_padding_or_a_tail_of_columns(head_dim: int, isa: str) -> None:
    spec = tiny_spec("qwen3", head_dim=head_dim, has_qkv_bias=True, num_heads=4, num_kv_heads=2, num_layers=2)
    assert_logits_are_specified(spec, random_tokens(spec, 70), isa)


BAD_WORDS = (
    *(str(token) for token in range(0, 320, 3)),
    *(f"{first} {last}" for first in range(1, 320, 3) for last in range(2, 90, 3)),
    "1 1 1",
    "400",
)
"""A third of all tokens, pairs of many others, a word that is said when it is said twice, a token that there is not."""
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
    {"temperature": 0.0, "min_tokens": 6, "logit_bias": {2: 50.0, 7: 49.0}, "stop_token_ids": (7,)},
    {"temperature": 0.0, "min_tokens": 6, "logit_bias": {2: 50.0, 7: 49.0}, "ignore_eos": True},
    {"temperature": 0.0, "allowed_token_ids": tuple(range(100, 140))},
    {"temperature": 1.0, "allowed_token_ids": (7, 300, 5), "logit_bias": {5: 1.0, 6: 100.0}, "repetition_penalty": 1.3},
    {"temperature": 0.0, "bad_words": BAD_WORDS},
    {"temperature": 1.0, "top_k": 9, "bad_words": BAD_WORDS, "frequency_penalty": 0.3},
]


@pytest.mark.parametrize("isa", sorted(set(ISAS) - set(ROUNDING_ISAS)))
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_tokens_and_logprobs_are_those_of_the_specification(sampling: dict[str, Any], isa: str) -> None:
    spec = tiny_spec()
    requests = requests_of(spec, logprobs=2, **sampling)
    reference = ReferenceExecutor(specification(spec, "bf16", isa), NUM_BLOCKS, bad_words=possible_sequences)
    ours, theirs = Table(native(spec, isa=isa), requests), Table(reference, requests)
    assert ours.run(10) == theirs.run(10)
    for slot in range(NUM_SLOTS):
        for here, there in zip(ours.logprobs[slot], theirs.logprobs[slot], strict=True):
            assert here.token_id == there.token_id
            assert here.logprob == pytest.approx(there.logprob, abs=0.01)
            assert [token for token, _ in here.top] == [token for token, _ in there.top]


@pytest.mark.parametrize(("dtype", "kv_dtype", "isa"), KERNELS)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_tokens_are_sampled_from_the_logits_as_specified(
    sampling: dict[str, Any], dtype: Dtype, kv_dtype: KvDtype, isa: str
) -> None:
    spec = tiny_spec()
    requests = requests_of(spec, logprobs=2, **sampling)
    executor = native(spec, dtype=dtype, kv_dtype=kv_dtype, isa=isa)
    table = Table(executor, requests)
    for request, outputs, logprobs in zip(requests, table.run(10), table.logprobs.values(), strict=True):
        tokens = np.array([*request.prompt_token_ids, *outputs], dtype=np.int32)
        rows = executor.logits(tokens)[request.num_prompt_tokens - 1 : -1].astype(np.float64)
        for i, (row, token) in enumerate(zip(rows, outputs, strict=True)):
            made = np.array(outputs[:i], dtype=np.int32)
            words = possible_sequences(request.sampling.bad_words)
            assert token == sample(row, request, made, executor.eos_token_ids, words)
            expected = token_logprob(row, token, 2)
            assert logprobs[i].logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert [other for other, _ in logprobs[i].top] == [other for other, _ in expected.top]


@pytest.mark.parametrize(("dtype", "kv_dtype", "isa"), KERNELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_chunks_batches_or_threads(
    dtype: Dtype, kv_dtype: KvDtype, isa: str, temperature: float
) -> None:
    spec = tiny_spec()
    requests = requests_of(spec, temperature=temperature, logprobs=1)
    first = Table(native(spec, dtype=dtype, kv_dtype=kv_dtype, isa=isa, num_threads=1), requests)
    expected = first.run(8)
    assert len({tuple(row) for row in expected}) == NUM_SLOTS
    for num_threads, chunk in ((1, 7), (2, 16), (3, 33), (4, 64)):
        table = Table(native(spec, dtype=dtype, kv_dtype=kv_dtype, isa=isa, num_threads=num_threads), requests)
        assert table.run(8, chunk) == expected
        assert table.logprobs == first.logprobs  # to the last bit

    mixed = Table(native(spec, dtype=dtype, kv_dtype=kv_dtype, isa=isa, num_threads=3, max_tokens=256), requests)
    mixed.step({3: 60, 0: 100})
    mixed.step({0: 50, 1: 5})
    mixed.step({1: 1, 0: 1, 3: 7, 2: 16})
    for _ in range(8):
        mixed.step({2: 1, 3: 1, 0: 1, 1: 1})
    assert mixed.outputs(8) == expected


@pytest.mark.parametrize(("dtype", "kv_dtype", "isa"), KERNELS)
def test_blocks_shared_within_one_step_change_nothing(dtype: Dtype, kv_dtype: KvDtype, isa: str) -> None:
    spec = tiny_spec()
    prompt = random_tokens(spec, 40)
    requests = [Request(i, prompt, 40, SamplingParams(temperature=1.0), 20, seed=3) for i in range(2)]
    apart, shared = (Table(native(spec, dtype=dtype, kv_dtype=kv_dtype, isa=isa), requests) for _ in range(2))
    apart.step({0: 40})
    shared.blocks[1, :2] = shared.blocks[0, :2]
    shared.computed[1] = 32
    shared.step({0: 40, 1: 8})
    for _ in range(5):
        apart.step({0: 1})
        shared.step({0: 1, 1: 1})
    assert shared.tokens[0, :46].tolist() == shared.tokens[1, :46].tolist() == apart.tokens[0, :46].tolist()


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("isa", ISAS)
def test_decodes_read_a_shared_prefix_once(isa: str, kv_dtype: KvDtype) -> None:
    """144 of 150 tokens in common blocks: the bits of four copies, and the reads of one for the two chunks of 64."""
    spec = tiny_spec()
    requests = [replace(request, index=i) for i, request in enumerate(requests_of(spec)[:1] * NUM_SLOTS)]
    outputs, read_bytes = [], []
    for is_shared in (False, True):
        executor = native(spec, kv_dtype=kv_dtype, isa=isa, num_threads=1)
        table = Table(executor, requests)
        for slot in range(NUM_SLOTS):
            if is_shared and slot > 0:
                table.blocks[slot, :9] = table.blocks[0, :9]
                table.computed[slot] = 144
            while table.computed[slot] < 150:
                table.step({slot: min(64, 150 - int(table.computed[slot]))})
        before = executor.counters().kv_bytes
        table.step(dict.fromkeys(range(NUM_SLOTS), 1))
        read_bytes.append(executor.counters().kv_bytes - before)
        for _ in range(5):
            table.step(dict.fromkeys(range(NUM_SLOTS), 1))
        outputs.append(table.tokens[:, 150:157].tolist())
    assert outputs[0] == outputs[1]
    assert read_bytes[0] - read_bytes[1] == 3 * 128 * spec.kv_bytes_per_token(kv_dtype)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_overlap_is_for_steps_that_can_be_split(kv_dtype: KvDtype) -> None:
    spec = tiny_spec()
    outputs = []
    for mode, num_overlapped in (("off", 0), ("auto", 0), ("on", 2)):  # auto: nothing is known of this machine
        executor = native(spec, kv_dtype=kv_dtype)
        executor.set_overlap(mode, OverlapCost())
        outputs.append(Table(executor, requests_of(spec)).run(4))
        assert executor.counters().num_overlapped_steps >= num_overlapped
        assert (executor.counters().num_overlapped_steps > 0) == (num_overlapped > 0)
    assert outputs[0] == outputs[1] == outputs[2]


def test_auto_overlaps_where_calibration_says_that_it_pays() -> None:
    spec = tiny_spec()
    executor = native(spec)
    slow_machine = OverlapCost(kv_bytes_per_s=1e6, gemm_flop_per_s=1e6, interference=Interference(0.0, 0.0))
    executor.set_overlap("auto", slow_machine)
    Table(executor, requests_of(spec)).run(2)
    assert executor.counters().num_overlapped_steps > 0


def test_a_slot_forgets_its_parameters() -> None:
    spec = tiny_spec()
    executor = native(spec)
    biased, plain = requests_of(spec, temperature=0.0, logit_bias={9: 100.0}), requests_of(spec, temperature=0.0)
    assert Table(executor, biased).run(2) == [[9, 9]] * NUM_SLOTS
    for slot in range(NUM_SLOTS):
        executor.release(slot)
    assert Table(executor, plain).run(2) == Table(native(spec), plain).run(2)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_counters_and_memory_are_reported(kv_dtype: KvDtype) -> None:
    spec = tiny_spec()
    executor = native(spec, kv_dtype=kv_dtype)
    Table(executor, requests_of(spec)).run(2)
    counters = executor.counters()
    assert counters.num_tokens == sum(LENGTHS) + NUM_SLOTS
    head_flop = 2 * 2 * NUM_SLOTS * spec.vocab_size * spec.hidden_size
    layer_flop = 2 * counters.num_tokens * spec.num_layers * spec.num_layer_parameters
    assert counters.matmul_flop == layer_flop + head_flop
    assert counters.attention_flop > 0
    assert counters.kv_bytes > 0
    assert executor.memory.kv_bytes == NUM_BLOCKS * 16 * spec.kv_bytes_per_token(kv_dtype)
    assert min(counters.seconds_by_op.values()) > 0
    assert executor.memory.total_bytes > 2 * spec.num_parameters + executor.memory.kv_bytes
    executor.close()


def test_what_cannot_work_says_why() -> None:
    spec = tiny_spec()
    with pytest.raises(ConfigError, match="portable"):
        native(spec, isa="sse9")
    weights = {name: random_weights(spec).tensor(name) for name in random_weights(spec).shape_by_name}
    del weights["layers.1.o_proj"]
    with pytest.raises(ConfigError, match=r"layers\.1\.o_proj"):
        NativeExecutor(spec, MemoryWeights(weights), EngineConfig(), num_blocks=4)
    table = Table(native(spec, max_tokens=64), requests_of(spec))
    with pytest.raises(ExecutorError, match="number of tokens is 65"):
        table.step({0: 65})
    table.blocks[0, 0] = NUM_BLOCKS
    with pytest.raises(ExecutorError, match=f"block number is {NUM_BLOCKS}"):
        table.step({0: 10})
    table.blocks = table.blocks.astype(np.int64)
    with pytest.raises(ExecutorError):
        table.step({1: 5})
    with pytest.raises(ConfigError, match="cannot run"):
        native(replace(spec, num_heads=6, num_kv_heads=4))

"""The reference executor: the forward pass against a second, unpaged one, and steps that must not change the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import CHANGES_BY_NAME, random_tokens, random_weights, tiny_spec

from blendserve.engine.step import StepPlan
from blendserve.errors import ConfigError
from blendserve.executors.reference import Precision, ReferenceExecutor, ReferenceModel, prompt_logits
from blendserve.models.rope import attention_factor, inverse_frequencies
from blendserve.models.spec import ModelSpec, RopeScaling
from blendserve.models.weights import Weights
from blendserve.request import Request, SamplingParams

MAX_LEN = 96
NUM_BLOCKS = 24


def plain_logits(spec: ModelSpec, weights: Weights, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """One token and one head at a time, in double precision, straight from the formulas; complex numbers rotate."""

    def load(name: str) -> NDArray[np.float64]:
        return weights.tensor(name).astype(np.float64)

    def norm(x: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(x / np.sqrt((x * x).mean() + spec.rms_norm_eps) * scale)

    def rotate(head: NDArray[np.float64], position: int) -> NDArray[np.float64]:
        half = spec.head_dim // 2
        turned = (
            (head[:half] + 1j * head[half:])
            * attention_factor(spec)
            * np.exp(1j * position * inverse_frequencies(spec))
        )
        return np.concatenate([turned.real, turned.imag])

    rows = [load("embed_tokens")[token] for token in tokens]
    for layer in range(spec.num_layers):
        t = {name: load(f"layers.{layer}.{name}") for name in ("input_norm", "post_attention_norm")}
        t |= {name: load(f"layers.{layer}.{name}_proj") for name in ("q", "k", "v", "o", "gate", "up", "down")}
        heads: dict[str, list[list[NDArray[np.float64]]]] = {"q": [], "k": [], "v": []}
        for position, row in enumerate(rows):
            x = norm(row, t["input_norm"])
            for kind, per_position in heads.items():
                projected = t[kind] @ x
                if spec.has_qkv_bias:
                    projected = projected + load(f"layers.{layer}.{kind}_proj.bias")
                split = list(projected.reshape(-1, spec.head_dim))
                if spec.has_qk_norm and kind != "v":
                    split = [norm(head, load(f"layers.{layer}.{kind}_norm")) for head in split]
                per_position.append(split if kind == "v" else [rotate(head, position) for head in split])
        group = spec.num_heads // spec.num_kv_heads
        for position, row in enumerate(rows):
            mixed = []
            for head in range(spec.num_heads):
                query = heads["q"][position][head]
                scores = [query @ heads["k"][p][head // group] / np.sqrt(spec.head_dim) for p in range(position + 1)]
                shares = np.exp(np.array(scores) - max(scores))
                shares /= shares.sum()
                mixed.append(sum(share * heads["v"][p][head // group] for p, share in enumerate(shares)))
            row = row + t["o"] @ np.concatenate(mixed)
            x = norm(row, t["post_attention_norm"])
            gate = t["gate"] @ x
            rows[position] = row + t["down"] @ (gate / (1 + np.exp(-gate)) * (t["up"] @ x))
    head_name = "embed_tokens" if spec.has_tied_embeddings else "lm_head"
    return np.stack([load(head_name) @ norm(row, load("norm")) for row in rows])


@pytest.mark.parametrize("name", CHANGES_BY_NAME)
def test_forward_pass_against_plain_formulas(name: str) -> None:
    """Both in double precision: apart by rounding only."""
    spec = tiny_spec(name, num_layers=2)
    weights, tokens = random_weights(spec), random_tokens(spec, 20)
    logits = prompt_logits(ReferenceModel(spec, weights, "float64"), tokens)
    np.testing.assert_allclose(logits, plain_logits(spec, weights, tokens), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("precision", "bits"), [("float32", 24), ("bf16", 8)])
def test_lower_precisions_stay_near(precision: Precision, bits: int) -> None:
    """Errors grow like a random walk over the reductions of 3 layers; logits are near unit scale."""
    spec = tiny_spec()
    weights, tokens = random_weights(spec), random_tokens(spec, 40)
    exact = prompt_logits(ReferenceModel(spec, weights, "float64"), tokens)
    rounded = prompt_logits(ReferenceModel(spec, weights, precision), tokens)
    difference = np.abs(rounded - exact).max()
    assert 0 < difference < 2.0**-bits * np.sqrt(3 * 600) * np.abs(exact).max()


def test_linear_scaling_stretches_positions() -> None:
    plain, scaled = tiny_spec(), tiny_spec(rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(inverse_frequencies(scaled) * 4.0, inverse_frequencies(plain))


def test_llama3_scaling_leaves_fast_frequencies_and_divides_slow_ones() -> None:
    """The published rule, wavelength by wavelength."""
    spec = replace(tiny_spec("head-64"), rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    for plain, scaled in zip(
        inverse_frequencies(replace(spec, rope_scaling=None)), inverse_frequencies(spec), strict=True
    ):
        wavelength = 2 * np.pi / plain
        if wavelength < 8192 / 4.0:
            assert scaled == plain
        elif wavelength > 8192 / 1.0:
            assert scaled == pytest.approx(plain / 8.0, rel=1e-14)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            assert scaled == pytest.approx((1 - smooth) * plain / 8.0 + smooth * plain, rel=1e-14)


class Sequences:
    """Drives an executor by hand: a table of token rows with shuffled blocks, and one step at a time."""

    def __init__(self, executor: ReferenceExecutor, requests: list[Request]) -> None:
        self.executor, self.requests = executor, requests
        self.tokens = np.zeros((len(requests), MAX_LEN), dtype=np.int32)
        blocks_each = MAX_LEN // executor.block_size
        order = np.random.default_rng(5).permutation(NUM_BLOCKS).astype(np.int32)
        self.blocks = order[: len(requests) * blocks_each].reshape(len(requests), blocks_each)
        self.computed = np.zeros(len(requests), dtype=np.int32)
        self.known = np.array([request.num_prompt_tokens for request in requests])
        for slot, request in enumerate(requests):
            self.tokens[slot, : request.num_prompt_tokens] = request.prompt_token_ids
            executor.admit(slot, request)

    def step(self, scheduled: dict[int, int]) -> dict[int, Any]:
        """Run so many tokens of each slot; returns position in the result -> log probabilities."""
        slots = np.array(list(scheduled), dtype=np.int32)
        counts = np.array(list(scheduled.values()), dtype=np.int32)
        is_sampled = self.computed[slots] + counts == self.known[slots]
        num_tokens = int(counts.sum())
        plan = StepPlan(slots, counts, self.computed[slots], is_sampled, self.tokens, self.blocks, num_tokens, 0)
        result = self.executor.execute(plan)
        self.computed[slots] += counts
        assert len(result.token_ids) == is_sampled.sum()
        for slot, token in zip(slots[is_sampled], result.token_ids, strict=True):
            self.tokens[slot, self.known[slot]] = token
            self.known[slot] += 1
        return dict(result.logprobs)

    def outputs(self, slot: int, count: int) -> list[int]:
        begin = self.requests[slot].num_prompt_tokens
        return self.tokens[slot, begin : begin + count].tolist()  # type: ignore[no-any-return]


def requests_of(spec: ModelSpec, **params: Any) -> list[Request]:
    prompts = [random_tokens(spec, length, seed=length) for length in (37, 5, 16)]
    sampling = SamplingParams(**params)
    return [Request(index, ids, len(ids), sampling, 20, seed=index) for index, ids in enumerate(prompts)]


def executor_of(spec: ModelSpec) -> ReferenceExecutor:
    return ReferenceExecutor(ReferenceModel(spec, random_weights(spec), "float64"), NUM_BLOCKS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_chunks_and_batches_do_not_change_tokens(temperature: float) -> None:
    """Whole prompts together; prompts in uneven chunks; one sequence alone at a time: the same tokens."""
    spec = tiny_spec()
    together = Sequences(executor_of(spec), requests_of(spec, temperature=temperature))
    together.step({0: 37, 1: 5, 2: 16})
    for _ in range(9):
        together.step({2: 1, 0: 1, 1: 1})

    chunked = Sequences(executor_of(spec), requests_of(spec, temperature=temperature))
    chunked.step({0: 7})
    chunked.step({0: 13, 2: 16})
    chunked.step({1: 5, 0: 17})
    alone = Sequences(executor_of(spec), requests_of(spec, temperature=temperature))
    for slot, length in ((2, 16), (0, 37), (1, 5)):
        alone.step({slot: length})
    for sequences in (chunked, alone):
        for slot in range(3):
            while sequences.known[slot] < sequences.requests[slot].num_prompt_tokens + 10:
                sequences.step({slot: 1})
    for slot in range(3):
        assert together.outputs(slot, 10) == chunked.outputs(slot, 10) == alone.outputs(slot, 10)
    assert len({tuple(together.outputs(slot, 10)) for slot in range(3)}) == 3


def test_greedy_tokens_are_those_of_the_whole_text() -> None:
    spec = tiny_spec("qwen3")
    sequences = Sequences(executor_of(spec), requests_of(spec, temperature=0.0))
    sequences.step({0: 37})
    for _ in range(5):
        sequences.step({0: 1})
    text = sequences.tokens[0, : sequences.known[0]]
    logits = prompt_logits(ReferenceModel(spec, random_weights(spec), "float64"), text[:-1])
    assert text[37:].tolist() == logits[36:].argmax(axis=1).tolist()


def test_a_shared_prefix_is_read_from_the_sequence_that_computed_it_in_the_same_step() -> None:
    spec = tiny_spec()
    prompt = random_tokens(spec, 40)
    requests = [Request(i, prompt, 40, SamplingParams(temperature=0.0), 20) for i in range(2)]
    sequences = Sequences(executor_of(spec), requests)
    sequences.blocks[1, :2] = sequences.blocks[0, :2]
    sequences.computed[1] = 32
    sequences.step({0: 40, 1: 8})
    for _ in range(5):
        sequences.step({0: 1, 1: 1})
    assert sequences.outputs(0, 6) == sequences.outputs(1, 6)


def test_output_positions_seeds_and_penalties_reach_the_sampler() -> None:
    """A huge repetition penalty never repeats; equal prompts with unequal seeds part."""
    spec = tiny_spec()
    prompt = random_tokens(spec, 5)
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1e9)
    warm = SamplingParams(temperature=1.5)
    requests = [
        Request(0, prompt, 5, sampling, 20),
        Request(1, prompt, 5, warm, 20, 1),
        Request(2, prompt, 5, warm, 20, 2),
    ]
    sequences = Sequences(executor_of(spec), requests)
    sequences.step({0: 5, 1: 5, 2: 5})
    for _ in range(12):
        sequences.step({0: 1, 1: 1, 2: 1})
    assert len(set(sequences.outputs(0, 13)) | set(prompt.tolist())) == 13 + len(set(prompt.tolist()))
    assert sequences.outputs(1, 13) != sequences.outputs(2, 13)


def test_logprobs_only_for_those_who_ask() -> None:
    spec = tiny_spec()
    requests = requests_of(spec, temperature=0.0)
    requests[2] = replace(requests[2], sampling=SamplingParams(temperature=0.0, logprobs=2))
    sequences = Sequences(executor_of(spec), requests)
    logprobs = sequences.step({0: 37, 1: 3, 2: 16})  # slot 1 samples nothing yet
    assert list(logprobs) == [1]
    assert logprobs[1].token_id == sequences.outputs(2, 1)[0] == logprobs[1].top[0][0]
    assert len(logprobs[1].top) == 2


def test_no_blocks_is_an_error() -> None:
    with pytest.raises(ConfigError, match="num_blocks is 0"):
        ReferenceExecutor(ReferenceModel(tiny_spec(), random_weights(tiny_spec())), 0)

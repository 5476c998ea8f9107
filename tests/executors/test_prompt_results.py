"""Log probabilities and embeddings of prompts: those of the specification, and the same bits under any schedule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_scenarios import PlannedPolicy
from test_native import ISAS, ROUNDING_ISAS
from tiny_files import tiny_directory
from tiny_models import random_tokens, random_weights, tiny_spec

from blendserve import run_batch
from blendserve.config import BLOCK_SIZE, EngineConfig, KvDtype
from blendserve.engine.keys import block_keys
from blendserve.engine.loop import EngineLoop
from blendserve.engine.step import Executor, StepPlan
from blendserve.engines.native.engine import open_native
from blendserve.engines.settings import NativeSettings
from blendserve.errors import ExecutorError
from blendserve.executors.native import NativeExecutor
from blendserve.executors.prompt_results import kept_bytes_per_block
from blendserve.executors.reference import ReferenceExecutor, ReferenceModel, prompt_logits
from blendserve.executors.sampling import token_logprob
from blendserve.models.pooling import Pooling
from blendserve.request import EmbeddingParams, Request, SamplingParams, SequenceOutput, TokenIds

SPEC = tiny_spec("llama")
MAX_LEN = 160
POOLINGS = [Pooling("last", normalises=True), Pooling("mean", normalises=False)]
STEM = random_tokens(SPEC, 70, seed=1)
PROMPTS: list[TokenIds] = [
    np.concatenate([STEM[:cut], random_tokens(SPEC, own, seed=100 + cut + own)])
    for cut, own in ((70, 3), (64, 1), (64, 16), (48, 40), (70, 3), (0, 5), (33, 15), (70, 60))
]


def config(**changes: Any) -> EngineConfig:
    limits = {"max_num_seqs": 6, "max_num_batched_tokens": 256, "max_model_len": MAX_LEN, "num_threads": 2}
    return EngineConfig(**{**limits, **changes})


def native(pooling: Pooling = POOLINGS[0], num_blocks: int = 80, isa: str = "auto", **changes: Any) -> NativeExecutor:
    limits = config(**changes)
    return NativeExecutor(SPEC, random_weights(SPEC), limits, num_blocks=num_blocks, isa=isa, pooling=pooling)


def reference(pooling: Pooling = POOLINGS[0], isa: str = "portable") -> ReferenceExecutor:
    model = ReferenceModel(SPEC, random_weights(SPEC), "bf16", has_bf16_products=isa in ROUNDING_ISAS)
    return ReferenceExecutor(model, 80, pooling=pooling)


def requests(
    prompts: Sequence[TokenIds] = PROMPTS, *, embeds: bool = False, dimensions: int | None = None
) -> list[Request]:
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=None if embeds else 2, ignore_eos=True)
    wanted = EmbeddingParams(dimensions) if embeds else None
    return [
        Request(index, ids, len(ids), sampling, 0, block_keys=block_keys(ids, BLOCK_SIZE), embedding=wanted)
        for index, ids in enumerate(prompts)
    ]


def run(
    executor: Executor, asked: Sequence[Request], order: Sequence[int] | None = None, budget: int = 256, **changes: Any
) -> list[SequenceOutput]:
    loop = EngineLoop(executor, config(**changes))
    policy = PlannedPolicy(asked, order or range(len(asked)), budgets=[budget])
    outputs = {output.index: output for output in loop.run(asked, policy)}
    loop.close()
    assert not [output.error for output in outputs.values() if output.error]
    return [outputs[index] for index in range(len(asked))]


def logprobs_of(output: SequenceOutput) -> list[tuple[int, float]]:
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    known = [entry for entry in output.prompt_logprobs if entry is not None]
    return [(entry.token_id, entry.logprob) for entry in known]


@pytest.mark.parametrize("isa", ISAS)
def test_log_probabilities_are_those_of_the_specification(isa: str) -> None:
    """Sums in another order move a log probability by no more than rounding to bfloat16 moves logits."""
    exact = ReferenceModel(SPEC, random_weights(SPEC), "float32")
    for found, specified, prompt in zip(
        run(native(isa=isa), requests()), run(reference(isa=isa), requests()), PROMPTS, strict=True
    ):
        values = np.array(logprobs_of(found))
        expected = np.array(logprobs_of(specified))
        unrounded = np.array(
            [
                token_logprob(row, token, 0).logprob
                for row, token in zip(prompt_logits(exact, prompt), prompt[1:], strict=False)
            ]
        )
        assert (values[:, 0] == expected[:, 0]).all()
        assert values[:, 0].tolist() == prompt[1:].tolist()
        tolerance = 2 * np.abs(expected[:, 1] - unrounded).max() + 1e-4
        assert np.abs(values[:, 1] - expected[:, 1]).max() <= tolerance
        assert np.abs(unrounded).max() > 50 * tolerance, "the comparison could not fail"


def test_log_probabilities_of_a_prompt_are_those_of_the_answers_that_wrote_it() -> None:
    """Greedy answers, asked for again as prompts: the same bits."""
    sampling = SamplingParams(temperature=0.0, logprobs=2, ignore_eos=True)
    asked = [Request(0, STEM, len(STEM), sampling, 40, block_keys=block_keys(STEM, BLOCK_SIZE))]
    executor = native()
    answer = run(executor, asked)[0]
    whole = np.concatenate([STEM, answer.token_ids])
    scored = run(native(), requests([whole]))[0]
    assert scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[len(STEM) :] == answer.logprobs


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("isa", ISAS)
def test_log_probabilities_depend_on_the_prompt_alone(isa: str, kv_dtype: KvDtype) -> None:
    def scores(
        order: Sequence[int] | None = None, num_blocks: int = 80, budget: int = 256, **changes: Any
    ) -> list[Any]:
        executor = native(isa=isa, kv_dtype=kv_dtype, num_blocks=num_blocks, **changes)
        return [output.prompt_logprobs for output in run(executor, requests(), order, budget, **changes)]

    alone = scores(enable_prefix_caching=False, max_num_seqs=1)
    assert scores() == alone
    assert scores(order=[7, 3, 1, 0, 2, 6, 5, 4]) == alone
    assert scores(budget=7, num_threads=1) == alone
    assert scores(num_blocks=14, budget=33) == alone
    assert scores(overlap="on") == alone


def test_a_shared_prefix_is_computed_once() -> None:
    outputs = run(native(), requests())
    assert [output.num_cached_tokens for output in outputs] == [0, 64, 64, 48, 64, 0, 32, 64]
    embedded = run(native(POOLINGS[1]), requests(embeds=True))
    assert [output.num_cached_tokens for output in embedded] == [0, 64, 64, 48, 64, 0, 32, 64]


def test_what_asks_for_nothing_of_its_prompt_gives_no_prefix_to_what_does() -> None:
    plain = [replace(request, sampling=SamplingParams(ignore_eos=True)) for request in requests()[:2]]
    mixed = [*plain, *(replace(request, index=request.index + 2) for request in requests()[:3])]
    outputs = run(native(), mixed)
    assert [output.num_cached_tokens for output in outputs] == [0, 64, 0, 64, 64]
    assert [output.prompt_logprobs for output in outputs[2:]] == [
        o.prompt_logprobs for o in run(native(), requests()[:3])
    ]


@pytest.mark.parametrize("pooling", POOLINGS, ids=["last", "mean"])
@pytest.mark.parametrize("isa", ISAS)
def test_embeddings_are_those_of_the_specification(isa: str, pooling: Pooling) -> None:
    found = run(native(pooling, isa=isa), requests(embeds=True))
    specified = run(reference(pooling, isa), requests(embeds=True))
    vectors = np.array([output.embedding for output in found])
    expected = np.array([output.embedding for output in specified])
    assert vectors.shape == (len(PROMPTS), SPEC.hidden_size)
    lengths = np.linalg.norm(expected, axis=1)
    assert np.linalg.norm(vectors - expected, axis=1).max() < 2**-7 * lengths.min(), "a step of bfloat16"
    assert min(np.linalg.norm(a - b) for a, b in pairwise(expected[[0, 1, 2, 3, 5, 6, 7]])) > 0.05 * lengths.max()
    if pooling.normalises:
        assert np.abs(lengths - 1).max() < 1e-6


@pytest.mark.parametrize("pooling", POOLINGS, ids=["last", "mean"])
@pytest.mark.parametrize("isa", ISAS)
def test_embeddings_depend_on_the_input_alone(isa: str, pooling: Pooling) -> None:
    def vectors(order: Sequence[int] | None = None, num_blocks: int = 80, budget: int = 256, **changes: Any) -> bytes:
        executor = native(pooling, isa=isa, num_blocks=num_blocks, **changes)
        outputs = run(executor, requests(embeds=True), order, budget, **changes)
        return np.array([output.embedding for output in outputs]).tobytes()

    alone = vectors(enable_prefix_caching=False, max_num_seqs=1)
    assert vectors() == alone
    assert vectors(order=[7, 3, 1, 0, 2, 6, 5, 4]) == alone
    assert vectors(budget=7, num_threads=1) == alone
    assert vectors(num_blocks=14, budget=33) == alone
    assert vectors(overlap="on") == alone


def test_fewer_dimensions_are_the_first_ones_again_of_length_one() -> None:
    whole = run(native(), requests(embeds=True))
    for cut, full in zip(run(native(), requests(embeds=True, dimensions=8)), whole, strict=True):
        assert cut.embedding is not None
        assert full.embedding is not None
        first = full.embedding[:8].astype(np.float64)
        assert np.abs(cut.embedding - first / np.linalg.norm(first)).max() < 1e-6


def test_a_plan_that_cannot_be_scored_is_refused_before_it_runs() -> None:
    """A prefix hit on blocks that kept nothing, and a prompt whose next token is none."""
    executor = native()
    request = requests([STEM])[0]
    tokens = np.zeros((6, MAX_LEN), np.int32)
    tokens[0, : len(STEM)] = STEM
    blocks = np.arange(6 * 10, dtype=np.int32).reshape(6, 10)

    def step(computed: int, count: int) -> None:
        one = np.ones(1, np.int32)
        executor.execute(StepPlan(0 * one, count * one, computed * one, one < 0, tokens, blocks, count, 0))

    executor.admit(0, request)
    with pytest.raises(ExecutorError, match="begin at token 16, before which nothing was kept"):
        step(16, 5)
    with pytest.raises(ExecutorError, match="begin at token 20"):
        step(20, 5)
    tokens[0, 16] = 320
    with pytest.raises(ExecutorError, match="token 16 is 320"):
        step(0, 16)
    tokens[0, 16] = STEM[16]
    with pytest.raises(ValueError, match="a block without log probabilities"):
        executor.prompt_result(0, blocks[0])
    step(0, 70)
    assert executor.prompt_result(0, blocks[0]).logprobs == run(native(), [request])[0].prompt_logprobs


def test_what_is_kept_of_prompts_shares_the_kv_memory(tmp_path: Path) -> None:
    memory = 1 << 20
    used = {}
    for name, asks in {"plain": {}, "few": {"prompt_logprobs": 0}, "many": {"prompt_logprobs": 20}}.items():
        body = {"prompt": "the capital of france", "max_tokens": 1, **asks}
        lines = [{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}]
        source = tmp_path / f"{name}.jsonl"
        source.write_text("".join(json.dumps(one) + "\n" for one in lines))
        settings = NativeSettings(str(tiny_directory(tmp_path / "model")), kv_memory_bytes=memory, num_threads=1)
        with closing(open_native(settings, notify=lambda _: None)) as engine:
            assert run_batch(source, tmp_path / f"{name}.out.jsonl", engine=engine).num_succeeded == 1
            assert engine.stats is not None
            assert engine.stats.resources is not None
            used[name] = engine.stats.resources.kv_bytes
    assert used["many"] < used["few"] < used["plain"] <= memory
    kept = kept_bytes_per_block(tiny_spec("llama").hidden_size, BLOCK_SIZE, 20, None)
    bytes_per_block = tiny_spec("llama").kv_bytes_per_token("bf16") * BLOCK_SIZE
    assert used["many"] // bytes_per_block == memory // (bytes_per_block + kept)

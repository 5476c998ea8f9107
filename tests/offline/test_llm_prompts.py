"""Prompts that are read and not answered: their log probabilities and embeddings, in Python and in batch files."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_fakes import read_rows
from test_llm import LIMITS, shared_prompts
from tiny_files import tiny_directory

from blendserve import LLM, NativeSettings, SamplingParams, run_batch
from blendserve.errors import ConfigError, RequestError

SCORED = SamplingParams(max_tokens=0, prompt_logprobs=2)
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "kv_memory_bytes": 1 << 22,
    "num_threads": 2,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(str(tiny), **LIMITS) as llm:
        yield llm


def test_every_token_of_a_prompt_but_the_first_has_a_log_probability(llm: LLM) -> None:
    prompts = shared_prompts(12)
    for prompt, output in zip(prompts, llm.generate(prompts, SCORED), strict=True):
        assert output.error is None
        assert output.outputs[0].token_ids == ()
        assert output.outputs[0].finish_reason == "length"
        assert output.prompt_logprobs is not None
        first, *others = output.prompt_logprobs
        assert first is None
        assert [entry.token_id for entry in others if entry] == prompt[1:]
        for entry in others:
            assert entry is not None
            assert len(entry.top) == 2
            assert entry.logprob <= entry.top[0][1] <= 0
    assert llm.stats.num_output_tokens == 0
    assert llm.stats.num_cached_tokens > 0


def test_scores_are_the_same_bits_whatever_runs_beside(llm: LLM) -> None:
    prompts = shared_prompts(10)
    together = [output.prompt_logprobs for output in llm.generate(prompts, SCORED)]
    alone = [llm.generate([prompt], SCORED)[0].prompt_logprobs for prompt in prompts]
    assert together == alone
    answered = llm.generate(prompts[::-1], SamplingParams(max_tokens=5, prompt_logprobs=2))[::-1]
    assert [output.prompt_logprobs for output in answered] == alone
    assert [output.prompt_logprobs for output in llm.generate(prompts[:2])] == [None, None]


def test_a_prompt_as_long_as_the_context_can_be_read_but_not_answered(tiny: Path) -> None:
    with LLM(str(tiny), max_model_len=64, **LIMITS) as llm:
        prompt = list(range(3, 67))
        read, answered = llm.generate([prompt, prompt], [SCORED, SamplingParams(max_tokens=1)])
        assert read.error is None
        assert isinstance(answered.error, RequestError)
        assert len(llm.embed([prompt])[0].outputs.embedding) == 96


def test_embed_gives_one_vector_for_each_prompt(llm: LLM) -> None:
    prompts = ["Once upon a time", "Once upon a hill", "Else"]
    outputs = llm.embed(prompts)
    assert [output.request_id for output in outputs] == ["0", "1", "2"]
    vectors = np.array([output.outputs.embedding for output in outputs])
    assert vectors.shape == (3, outputs[0].outputs.hidden_size)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    assert all(output.finished and output.error is None for output in outputs)
    alone = [llm.embed(prompt)[0].outputs.embedding for prompt in prompts]
    assert [output.outputs.embedding for output in outputs] == alone
    assert llm.embed([list(map(int, outputs[0].prompt_token_ids))])[0].outputs == outputs[0].outputs
    assert min(np.abs(a - b).max() for a, b in pairwise(vectors)) > 0.01


def test_embed_takes_fewer_dimensions_and_says_what_it_cannot_read(llm: LLM) -> None:
    (short,) = llm.embed("Once", dimensions=4)
    assert np.linalg.norm(short.outputs.embedding) == pytest.approx(1)
    assert short.outputs.hidden_size == 4
    for wrong in (0, 97):
        with pytest.raises(ConfigError, match=f"dimensions is {wrong}; it must be between 1 and 96"):
            llm.embed("Once", dimensions=wrong)
    good, bad = llm.embed([[5, 6], [5, 1 << 20]])
    assert good.error is None
    assert isinstance(bad.error, RequestError)
    assert bad.outputs.embedding == []


def mixed_lines() -> list[dict[str, Any]]:
    """Every endpoint in one file, many prompts of which begin alike."""
    stem = "Once upon a time there was a tiny model that was asked the same thing over and over. "
    bodies: list[tuple[str, dict[str, Any]]] = []
    for number in range(6):
        text = stem + f"This was time number {number}."
        bodies += [
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 6}),
            ("/v1/completions", {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}),
            ("/v1/responses", {"input": text, "max_output_tokens": 6, "temperature": 0}),
            ("/v1/embeddings", {"input": [text, stem], "encoding_format": "base64" if number % 2 else "float"}),
        ]
    bodies.append(("/v1/embeddings", {"input": stem, "dimensions": 97}))
    return [
        {"custom_id": str(number), "method": "POST", "url": url, "body": body}
        for number, (url, body) in enumerate(bodies)
    ]


def test_one_file_may_mix_all_endpoints(tiny: Path, tmp_path: Path) -> None:
    """Planned and run together: the rows are those of each line alone, cached tokens aside."""
    lines = mixed_lines()

    def answers(name: str, some: list[dict[str, Any]]) -> dict[str, Any]:
        source, target = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.out.jsonl"
        source.write_text("\n".join(map(json.dumps, some)))
        run_batch(source, target, engine=NativeSettings(model=str(tiny), **SETTINGS))
        return {row["custom_id"]: row["response"]["body"] for row in read_rows(target)}

    together = answers("all", lines)
    assert len(together) == len(lines) - 1, "97 dimensions are too many"
    objects = [together[str(number)]["object"] for number in range(4)]
    assert objects == ["chat.completion", "text_completion", "response", "list"]
    assert together["1"]["choices"][0]["text"].endswith("time number 0.")
    encoded = np.frombuffer(base64.b64decode(together["7"]["data"][1]["embedding"]), "<f4")
    assert encoded.tolist() == together["3"]["data"][1]["embedding"]
    for number in (1, 2, 3):
        alone = answers(f"alone-{number}", lines[number : number + 1])[str(number)]
        for name in ("choices", "output", "data"):
            assert contents(alone.get(name)) == contents(together[str(number)].get(name))


def contents(items: Any) -> Any:
    """Without ids, which depend on the line's number."""
    return [{name: value for name, value in item.items() if name != "id"} for item in items or ()]

"""`LLM` end to end on tiny models: what it answers, and that nothing but the request changes the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_files import tiny_directory
from tiny_models import CHANGES_BY_NAME, tiny_spec

from blendserve import LLM, RequestOutput, SamplingParams
from blendserve.config import KV_DTYPES
from blendserve.errors import CapacityError, ConfigError, RequestError
from blendserve.planner.policies import POLICY_NAMES

LIMITS: dict[str, Any] = {
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


def shared_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 20 to 90 tokens, two thirds of which begin with one of two long prefixes."""
    random = np.random.default_rng(seed)
    prefixes = [random.integers(3, 320, 50).tolist(), random.integers(3, 320, 35).tolist(), []]
    return [prefixes[i % 3] + random.integers(3, 320, int(random.integers(20, 40))).tolist() for i in range(count)]


def sampled_params(count: int) -> list[SamplingParams]:
    """Greedy, sampled, penalised, biased and bounded requests of 1 to 30 tokens."""
    kinds = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, top_p=0.9, seed=7),
        SamplingParams(temperature=1.2, top_k=20, repetition_penalty=1.2),
        SamplingParams(temperature=0.7, min_p=0.05, presence_penalty=0.5, frequency_penalty=0.3, min_tokens=4),
        SamplingParams(temperature=1.0, logit_bias={5: 4.0, 9: -100.0}, ignore_eos=True),
        SamplingParams(temperature=1.5, allowed_token_ids=tuple(range(20, 60)), bad_words=("t", " u", "vw")),
    )
    fields = [{name: getattr(kind, name) for name in SamplingParams.__dataclass_fields__} for kind in kinds]
    return [SamplingParams(**{**fields[i % len(kinds)], "max_tokens": 4 + i * 7 % 27}) for i in range(count)]


def tokens_of(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts: list[str | list[int]] = ["the capital of france", [5, 6, 7], "the answer"]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    assert [output.request_id for output in outputs] == ["0", "1", "2"]
    assert [output.prompt for output in outputs] == ["the capital of france", None, "the answer"]
    assert outputs[1].prompt_token_ids == [5, 6, 7]
    assert all(len(output.outputs[0].token_ids) == 5 for output in outputs)
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)


def test_one_prompt_is_a_list_of_one(llm: LLM) -> None:
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    ids = llm.model.tokenizer.encode("the capital of france").tolist()
    assert tokens_of(llm.generate("the capital of france", greedy)) == tokens_of(llm.generate(ids, greedy))
    assert llm.generate([], greedy) == []


def test_chat_uses_the_template_of_the_model(llm: LLM) -> None:
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    message = {"role": "user", "content": "what is the answer?"}
    (output,) = llm.chat([message], greedy)
    assert output.prompt == "<s>user: what is the answer?\nassistant: "
    assert tokens_of(llm.chat([[message], [message]], greedy)) == tokens_of([output, output])


def test_only_allowed_tokens_are_said_and_bad_words_are_not(llm: LLM) -> None:
    free = SamplingParams(max_tokens=40, temperature=1.0, seed=1, ignore_eos=True)
    (output,) = llm.generate([[4, 5, 6]], free)
    said, tokenizer = output.outputs[0].token_ids, llm.model.tokenizer
    bounded = SamplingParams(max_tokens=40, temperature=1.0, seed=1, ignore_eos=True, allowed_token_ids=(50, 51, 52))
    assert set(llm.generate([[4, 5, 6]], bounded)[0].outputs[0].token_ids) == {50, 51, 52}
    token, letter = next((token, text) for token in said if (text := tokenizer.decode([token])).isalpha())
    assert tokenizer.encode(letter, add_special_tokens=False).tolist() == [token]
    (clean,) = llm.generate([[4, 5, 6]], replace(free, bad_words=(letter,)))
    assert token not in clean.outputs[0].token_ids
    assert len(clean.outputs[0].token_ids) == 40


def test_choices_differ_and_repeat(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, n=3, seed=3, ignore_eos=True)
    (first,) = llm.generate([[4, 5, 6]], params)
    (again,) = llm.generate([[4, 5, 6]], params)
    assert [choice.index for choice in first.outputs] == [0, 1, 2]
    assert len({choice.token_ids for choice in first.outputs}) == 3
    assert first.outputs == again.outputs


def test_logprobs_are_those_of_the_sampled_tokens(llm: LLM) -> None:
    (output,) = llm.generate([[4, 5, 6]], SamplingParams(max_tokens=4, temperature=0.0, logprobs=3, ignore_eos=True))
    choice = output.outputs[0]
    assert choice.logprobs is not None
    assert [token.token_id for token in choice.logprobs] == list(choice.token_ids)
    assert all(len(token.top) == 3 and token.top[0][0] == token.token_id for token in choice.logprobs)
    assert choice.cumulative_logprob == pytest.approx(sum(token.logprob for token in choice.logprobs))


def test_a_stop_string_ends_and_is_cut_off(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    (free,) = llm.generate([[4, 5, 6]], params)
    text = free.outputs[0].text
    stop = text[5:8]
    (stopped,) = llm.generate(
        [[4, 5, 6]], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop=(stop,))
    )
    assert stopped.outputs[0].text == text[: text.find(stop)]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)


def test_a_prompt_that_cannot_be_served_fails_alone(llm: LLM) -> None:
    outputs = llm.generate([[5] * 600, [5, 6], [], [400]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert [type(output.error) for output in outputs] == [RequestError, type(None), RequestError, RequestError]
    assert "600" in str(outputs[0].error)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length", "error", "error"]


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (SamplingParams(n=0), "n"),
        (SamplingParams(n=129), "n"),
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(max_tokens=4, min_tokens=5), "min_tokens"),
        (SamplingParams(temperature=-1.0), "temperature"),
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(min_p=1.5), "min_p"),
        (SamplingParams(repetition_penalty=0.0), "repetition_penalty"),
        (SamplingParams(seed=2**64), "seed"),
        (SamplingParams(stop=("",)), "stop"),
        (SamplingParams(logprobs=21), "logprobs"),
        (SamplingParams(logit_bias={320: 1.0}), "logit_bias"),
        (SamplingParams(logit_bias={-1: 1.0}), "logit_bias"),
        (SamplingParams(stop_token_ids=(2**40,)), "stop_token_ids"),
    ],
)
def test_parameters_out_of_range_fail_alone(llm: LLM, params: SamplingParams, param: str) -> None:
    outputs = llm.generate([[5, 6], [5, 6]], [params, SamplingParams(max_tokens=3, ignore_eos=True)])
    assert isinstance(outputs[0].error, RequestError)
    assert outputs[0].error.param == param
    assert outputs[0].prompt_token_ids == [5, 6]
    assert all(choice.finish_reason == "error" for choice in outputs[0].outputs)
    assert outputs[1].outputs[0].finish_reason == "length"


def test_one_stop_string_and_numpy_numbers_are_taken(llm: LLM) -> None:
    stop: Any = "a"
    seed: Any = np.int64(3)
    as_vllm = SamplingParams(max_tokens=20, temperature=1.0, stop=stop, seed=seed)
    plain = SamplingParams(max_tokens=20, temperature=1.0, stop=("a",), seed=3)
    assert tokens_of(llm.generate([[5, 6]], as_vllm)) == tokens_of(llm.generate([[5, 6]], plain))


@pytest.mark.parametrize("prompt", [[1.5, 2.0], [[5], [6, 7]], [2**70], ["a", 3], [-1], 7], ids=str)
def test_a_prompt_that_is_no_list_of_token_ids_fails_alone(llm: LLM, prompt: Any) -> None:
    outputs = llm.generate([prompt, [5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert isinstance(outputs[0].error, RequestError)
    assert outputs[1].outputs[0].finish_reason == "length"


def test_a_conversation_that_the_template_refuses_fails_alone(llm: LLM) -> None:
    good: Any = [{"role": "user", "content": "hi"}]
    outputs = llm.chat([good, [{"role": "user"}]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert isinstance(outputs[1].error, RequestError)
    assert outputs[0].outputs[0].finish_reason == "length"


def test_closing_twice_does_nothing_and_prompts_are_refused_then(tiny: Path) -> None:
    with LLM(str(tiny), **LIMITS) as llm:
        llm.close()
    with pytest.raises(ConfigError, match="closed"):
        llm.generate([[5, 6]])


def test_a_request_beyond_the_kv_memory_fails_alone(tiny: Path) -> None:
    with LLM(str(tiny), **{**LIMITS, "kv_memory_bytes": 1 << 17}) as llm:
        outputs = llm.generate([[5] * 400, [5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert isinstance(outputs[0].error, CapacityError)
    assert "--kv-memory" in str(outputs[0].error)
    assert outputs[1].outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "fastest"}, "unknown policy 'fastest'"),
        ({"max_model_len": 1024}, "made for 512 tokens"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"isa": "sse9"}, "sse9"),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(str(tiny), **settings)


def test_parameters_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="2 sampling parameters for 1 prompts"):
        llm.generate([[5]], [SamplingParams(), SamplingParams()])


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"policy {policy}": {"policy": policy} for policy in POLICY_NAMES},
    "steps of 17 tokens": {"max_num_batched_tokens": 17, "max_num_seqs": 16},
    "steps of 1000 tokens": {"max_num_batched_tokens": 1000},
    "one at a time": {"max_num_seqs": 1},
    "one thread": {"num_threads": 1},
    "three threads": {"num_threads": 3},
    "no prefix caching": {"enable_prefix_caching": False},
    "overlap": {"overlap": "on"},
    "overlap on four threads": {"overlap": "on", "num_threads": 4},
    "overlap in steps of 17 tokens": {"overlap": "on", "max_num_batched_tokens": 17, "max_num_seqs": 16},
    "no overlap": {"overlap": "off"},
}


@pytest.mark.parametrize("name", CHANGES_BY_NAME)
def test_tokens_depend_on_nothing_but_the_request(name: str, tmp_path: Path) -> None:
    """Bitwise equal tokens under any order, chunk, batch, thread count, cache and preemption."""
    directory = str(tiny_directory(tmp_path / "model", name))
    prompts, params = shared_prompts(24), sampled_params(24)
    with LLM(directory, **LIMITS) as llm:
        expected = tokens_of(llm.generate(prompts, params))
        assert llm.stats.num_cached_tokens > 0
    for variant, settings in VARIANTS.items():
        with LLM(directory, **{**LIMITS, **settings}) as llm:
            assert tokens_of(llm.generate(prompts, params)) == expected, variant
    memory_for_few = 256 * tiny_spec(name).kv_bytes_per_token()
    with LLM(directory, **{**LIMITS, "kv_memory_bytes": memory_for_few, "policy": "fcfs"}) as llm:
        assert tokens_of(llm.generate(prompts, params)) == expected, "memory for few"
        assert llm.stats.num_preemptions > 0, "the memory was not small enough to test preemption"


def test_tokens_over_an_int8_kv_cache_depend_on_nothing_but_the_request(tmp_path: Path) -> None:
    directory = str(tiny_directory(tmp_path / "model"))
    prompts, params = shared_prompts(24), sampled_params(24)
    with LLM(directory, **LIMITS, kv_dtype="int8") as llm:
        expected = tokens_of(llm.generate(prompts, params))
    for variant, settings in VARIANTS.items():
        with LLM(directory, **{**LIMITS, **settings}, kv_dtype="int8") as llm:
            assert tokens_of(llm.generate(prompts, params)) == expected, variant
    with LLM(directory, **LIMITS) as llm:
        assert tokens_of(llm.generate(prompts, params)) != expected, "the KV dtype was not used"


def test_the_same_memory_holds_more_tokens_in_int8(tmp_path: Path) -> None:
    directory, spec = str(tiny_directory(tmp_path / "model")), tiny_spec()
    capacity = []
    for kv_dtype in KV_DTYPES:
        with LLM(directory, **{**LIMITS, "kv_memory_bytes": 1 << 20}, kv_dtype=kv_dtype) as llm:
            llm.generate([[3, 4, 5]])
            capacity.append(llm.stats.capacity_tokens)
    assert capacity == [(1 << 20) // (spec.kv_bytes_per_token(kv_dtype) * 16) * 16 for kv_dtype in KV_DTYPES]
    assert capacity[1] > 1.7 * capacity[0]


def prefix_heavy_prompts(seed: int = 0) -> list[list[int]]:
    """24 prompts that begin with the same 140 tokens; a third of them goes on with 110 more that they share."""
    random = np.random.default_rng(seed)
    common, longer = random.integers(3, 320, 140).tolist(), random.integers(3, 320, 110).tolist()
    lengths = random.integers(5, 60, 24).tolist()
    return [
        common + (longer if i % 3 == 0 else []) + random.integers(3, 320, length).tolist()
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("name", CHANGES_BY_NAME)
def test_reading_shared_prefixes_once_changes_no_token(name: str, tmp_path: Path) -> None:
    """Where blocks are shared, decodes read them together; without prefix caching there is nothing to share."""
    directory = tiny_directory(tmp_path / name, name)
    prompts = prefix_heavy_prompts()
    outputs = []
    variants: list[dict[str, Any]] = [
        {"enable_prefix_caching": False},
        {},
        {"num_threads": 1},
        {"num_threads": 4},
        {"overlap": "on"},
    ]
    for settings in variants:
        with LLM(str(directory), **{**LIMITS, "kv_memory_bytes": 1 << 24, **settings}) as llm:
            outputs.append(tokens_of(llm.generate(prompts, sampled_params(len(prompts)))))
    assert outputs[1:] == outputs[:1] * (len(variants) - 1)


@pytest.mark.model
def test_the_default_model_knows_the_capital_of_france() -> None:
    with LLM(max_num_seqs=8, kv_memory_bytes=1 << 28) as llm:
        question = {"role": "user", "content": "What is the capital of France?"}
        (output,) = llm.chat([question], SamplingParams(max_tokens=16, temperature=0.0))
    assert "Paris" in output.outputs[0].text

"""`LLM.stream` and generators as input: read a window at a time, answered as lists are, never silently cut short."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from test_llm import LIMITS, sampled_params, shared_prompts, tokens_of
from tiny_files import tiny_directory

from blendserve import LLM, SamplingParams
from blendserve.errors import ConfigError, ExecutorError, RequestError
from blendserve.planner.policies import POLICY_NAMES

SHORT = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(str(tiny), **LIMITS) as llm:
        yield llm


def test_a_generator_is_answered_as_a_list_is(llm: LLM) -> None:
    prompts, params = shared_prompts(24), sampled_params(24)
    expected = llm.generate(prompts, params)
    assert tokens_of(llm.generate((prompt for prompt in prompts), (each for each in params))) == tokens_of(expected)
    streamed = sorted(llm.stream(iter(prompts), params, window=5), key=lambda output: int(output.request_id))
    assert tokens_of(streamed) == tokens_of(expected)
    assert [output.prompt_token_ids for output in streamed] == prompts
    assert llm.stats.num_cached_tokens > 0, "prefixes are shared across windows"


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_policy_serves_windows(policy: str, tiny: Path) -> None:
    with LLM(str(tiny), **{**LIMITS, "policy": policy, "max_num_seqs": 4}) as llm:
        outputs = list(llm.stream(shared_prompts(30), SHORT, window=4))
    assert sorted(int(output.request_id) for output in outputs) == list(range(30))


def test_prompts_are_read_as_they_are_needed_and_outputs_come_meanwhile(llm: LLM) -> None:
    read: list[int] = []

    def prompts() -> Iterator[list[int]]:
        for number in count():
            read.append(number)
            yield [5, 6, 3 + number % 300]

    stream = llm.stream(prompts(), SHORT, window=4)
    assert not read, "nothing is read before the first output is asked for"
    first = list(islice(stream, 40))
    assert len({output.request_id for output in first}) == 40
    assert len(read) <= 40 + 4 * LIMITS["max_num_seqs"]
    stream.close()  # type: ignore[attr-defined]
    llm.generate([[5, 6]], SHORT)


def test_texts_ids_and_conversations_may_be_mixed(llm: LLM) -> None:
    question = [{"role": "user", "content": "what is it?"}]
    mixed: list[Any] = ["the capital", [5, 6, 7], question]
    expected = [*llm.generate(mixed[:2], SHORT), *llm.chat(question, SHORT)]
    found = sorted(llm.stream(mixed, SHORT, window=2), key=lambda output: int(output.request_id))
    assert tokens_of(found) == tokens_of(expected)
    assert [output.prompt for output in found] == [output.prompt for output in expected]
    assert tokens_of(llm.chat((each for each in [question]), SHORT)) == tokens_of(expected[2:])


def test_what_cannot_be_served_fails_alone_in_whole_windows_of_it(llm: LLM) -> None:
    prompts: list[Any] = [[], [-1], [5] * 600, [], [5, 6], [2**40], []]
    outputs = {int(output.request_id): output for output in llm.stream(iter(prompts), SHORT, window=2)}
    assert sorted(outputs) == list(range(7))
    assert [number for number in outputs if outputs[number].error is None] == [4]
    assert all(isinstance(outputs[number].error, RequestError) for number in outputs if number != 4)


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert list(llm.stream(iter(()))) == []
    assert llm.generate(iter(())) == []


def test_prompts_and_parameters_of_different_number(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="1 sampling parameters for more prompts"):
        list(llm.stream([[5], [6]], iter([SHORT])))
    with pytest.raises(ConfigError, match="1 prompts for more sampling parameters"):
        llm.generate(iter([[5]]), [SHORT, SHORT])
    with pytest.raises(ConfigError, match="window is 0"):
        llm.stream([[5]], window=0)


def test_an_error_of_the_users_generator_ends_the_stream_and_spares_the_engine(llm: LLM) -> None:
    def broken() -> Iterator[list[int]]:
        yield from ([5, 6, number] for number in range(3, 20))
        raise OSError("the database is gone")

    with pytest.raises(OSError, match="database"):
        list(llm.stream(broken(), SHORT, window=4))
    assert len(llm.generate([[5, 6]], SHORT)) == 1


def test_another_call_ends_a_stream_and_the_stream_says_so(llm: LLM) -> None:
    stream = llm.stream(([5, 6, 3 + number] for number in range(60)), SHORT, window=4)
    next(stream)
    assert llm.generate([[5, 6]], SHORT)[0].error is None
    with pytest.raises(ExecutorError, match="another call of this LLM ended this stream"):
        list(stream)


def test_a_closed_llm_streams_nothing(tiny: Path) -> None:
    with LLM(str(tiny), **LIMITS) as llm:
        stream = llm.stream([[5, 6]], SHORT)
    with pytest.raises(ConfigError, match="closed"):
        list(stream)
    with pytest.raises(ConfigError, match="closed"):
        llm.stream([[5, 6]])

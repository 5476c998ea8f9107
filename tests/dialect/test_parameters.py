"""The parameters of a body: what is honoured, what is refused, and which one a refusal names."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from batch_fakes import batch_line
from parsed_lines import CHAT, TEXT, parse, refusal

from blendserve.dialect.readers import MAX_LISTED_TOKENS, SMALLEST_TOP_P
from blendserve.dialect.unsupported import CHAT_UNSUPPORTED
from blendserve.request import SamplingParams


@pytest.mark.parametrize("body", [CHAT, TEXT], ids=["chat", "completions"])
def test_every_shared_parameter_reaches_the_sampling_params(body: dict[str, Any]) -> None:
    given_parameters = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.1,
        "seed": -3,
        "stop": ["a", "b", "c", "d", "e"],
        "stop_token_ids": [5, 6, 5],
        "ignore_eos": True,
        "n": 2,
        "logit_bias": {"50": -100, "7": 2.5},
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.2,
    }
    assert parse({**body, **given_parameters}).sampling == SamplingParams(
        max_tokens=7,
        min_tokens=2,
        temperature=0.0,
        top_p=0.5,
        top_k=40,
        min_p=0.1,
        seed=-3,
        stop=("a", "b", "c", "d", "e"),
        stop_token_ids=(5, 6),
        ignore_eos=True,
        n=2,
        logit_bias={50: -100.0, 7: 2.5},
        presence_penalty=1.0,
        frequency_penalty=-1.5,
        repetition_penalty=1.2,
    )


def test_defaults_are_each_endpoints_own() -> None:
    assert parse(CHAT).sampling == SamplingParams(max_tokens=None)
    assert parse(TEXT).sampling == SamplingParams(max_tokens=16)


@pytest.mark.parametrize("body", [CHAT, TEXT], ids=["chat", "completions"])
def test_null_means_not_given(body: dict[str, Any]) -> None:
    nulls = dict.fromkeys(("max_tokens", "temperature", "stop", "logprobs", "response_format", "seed", "stream", "n"))
    assert parse({**body, **nulls}) == parse(body)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"max_completion_tokens": 9}, {"max_tokens": 9}),
        ({"max_completion_tokens": 9, "max_tokens": 9}, {"max_tokens": 9}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": []}, {"stop": ()}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": 0}, {"top_p": SMALLEST_TOP_P}),
        ({"logit_bias": {}}, {"logit_bias": {}}),
    ],
)
def test_spellings_of_the_same_thing(parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    sampling = parse({**CHAT, **parameters}).sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({**CHAT, "logprobs": True}, 0),
        ({**CHAT, "logprobs": True, "top_logprobs": 5}, 5),
        ({**CHAT, "logprobs": False}, None),
        ({**TEXT, "logprobs": 0}, 0),
        ({**TEXT, "logprobs": 5}, 5),
    ],
)
def test_logprobs_in_each_endpoints_style(body: dict[str, Any], expected: int | None) -> None:
    assert parse(body).sampling.logprobs == expected


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
HARMLESS = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "stream": False,
    "stream_options": {"include_usage": True},
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "request_id": "r",
    "cache_salt": "s",
    "kv_transfer_params": {},
    "timeout": 60,
    "priority": 1,
    "response_format": {"type": "text"},
    "best_of": 1,
    "echo": False,
    "service_tier": "auto",
}


@pytest.mark.parametrize("body", [CHAT, TEXT], ids=["chat", "completions"])
def test_harmless_parameters_change_nothing(body: dict[str, Any]) -> None:
    assert parse({**body, **HARMLESS}) == parse(body)
    assert parse({**CHAT, "tools": [], "tool_choice": "none", "parallel_tool_calls": True}) == parse(CHAT)


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"tools": [TOOL]}, "unsupported_parameter"),
        ({"tools": {}}, "invalid_type"),
        ({"tools": [TOOL, TOOL]}, "invalid_value"),
        ({"tool_choice": "required"}, "invalid_value"),
        ({"tool_choice": "some"}, "invalid_value"),
        ({"parallel_tool_calls": 1}, "invalid_type"),
        ({"response_format": {"type": "xml"}}, "invalid_value"),
        ({"stream": True}, "unsupported_parameter"),
        ({"stream": 0}, "unsupported_parameter"),
        ({"echo": True}, "unsupported_parameter"),
        ({"best_of": 2}, "unsupported_parameter"),
        ({"reasoning_effort": "much"}, "invalid_value"),
        ({"thinking": True}, "invalid_value"),
        ({"chat_template_kwargs": []}, "invalid_type"),
        ({"documents": ["x"]}, "invalid_type"),
        ({"add_generation_prompt": "yes"}, "invalid_type"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "invalid_value"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter"),
        ({"temprature": 1}, "unknown_parameter"),
        ({"prompt": "hi"}, "unknown_parameter"),
        ({"temprature": None}, "unknown_parameter"),
        ({"temperature": -0.1}, "invalid_value"),
        ({"temperature": math.inf}, "invalid_value"),
        ({"temperature": math.nan}, "invalid_value"),
        ({"temperature": 10**400}, "invalid_value"),
        ({"temperature": "1"}, "invalid_type"),
        ({"temperature": True}, "invalid_type"),
        ({"top_p": 1.01}, "invalid_value"),
        ({"top_k": 1.5}, "invalid_type"),
        ({"max_tokens": math.inf}, "invalid_type"),
        ({"bad_words": "x"}, "invalid_type"),
        ({"bad_words": [""]}, "invalid_value"),
        ({"allowed_token_ids": []}, "invalid_value"),
        ({"allowed_token_ids": [256]}, "invalid_value"),
        ({"truncate_prompt_tokens": 0}, "invalid_value"),
        ({"skip_special_tokens": "no"}, "invalid_type"),
        ({"include_stop_str_in_output": 1}, "invalid_type"),
        ({"top_k": -2}, "invalid_value"),
        ({"min_p": [0]}, "invalid_type"),
        ({"max_tokens": -1}, "invalid_value"),
        ({"prompt_logprobs": 21}, "invalid_value"),
        ({"prompt_logprobs": True}, "invalid_type"),
        ({"max_tokens": 10**5000}, "invalid_value"),
        ({"max_tokens": True}, "invalid_type"),
        ({"max_tokens": "16"}, "invalid_type"),
        ({"min_tokens": -1}, "invalid_value"),
        ({"n": 0}, "invalid_value"),
        ({"n": 129}, "invalid_value"),
        ({"seed": 2**63}, "invalid_value"),
        ({"seed": 1.5}, "invalid_type"),
        ({"stop": [1]}, "invalid_type"),
        ({"stop": [""]}, "invalid_value"),
        ({"stop": ["x"] * 65}, "invalid_value"),
        ({"stop_token_ids": 5}, "invalid_type"),
        ({"stop_token_ids": list(range(MAX_LISTED_TOKENS + 1))}, "invalid_value"),
        ({"logit_bias": dict.fromkeys(map(str, range(MAX_LISTED_TOKENS + 1)), 1)}, "invalid_value"),
        ({"stop_token_ids": [True]}, "invalid_type"),
        ({"stop_token_ids": [-1]}, "invalid_value"),
        ({"stop_token_ids": [256]}, "invalid_value"),
        ({"ignore_eos": 1}, "invalid_type"),
        ({"logit_bias": []}, "invalid_type"),
        ({"logit_bias": {"x": 1}}, "invalid_value"),
        ({"logit_bias": {"²": 1}}, "invalid_value"),
        ({"logit_bias": {"5": 1, "05": 2}}, "invalid_value"),
        ({"logit_bias": {"256": 1}}, "invalid_value"),
        ({"logprobs": 3}, "invalid_type"),
        ({"top_logprobs": 3}, "invalid_value"),
        ({"presence_penalty": 3}, "invalid_value"),
        ({"repetition_penalty": 0}, "invalid_value"),
    ],
)
def test_a_refusal_names_the_parameter(parameters: dict[str, Any], code: str) -> None:
    error = refusal(batch_line("a", {**CHAT, **parameters}) | {"url": "/v1/chat/completions"})
    assert (error.code, error.param, error.status_code) == (code, next(iter(parameters)), 400)
    assert error.param is not None
    assert error.param in error.message
    assert len(error.message) < 400


def test_parameters_that_contradict_each_other() -> None:
    assert refusal(batch_line("a", {**CHAT, "min_tokens": 5, "max_tokens": 4})).param == "min_tokens"
    error = refusal(batch_line("a", {**CHAT, "max_tokens": 5, "max_completion_tokens": 4}))
    assert error.param == "max_completion_tokens"


def test_a_bias_that_is_no_number_names_its_token() -> None:
    assert refusal(batch_line("a", {**CHAT, "logit_bias": {"5": "high"}})).param == "logit_bias.5"
    assert refusal(batch_line("a", {**CHAT, "logit_bias": {"5": math.nan}})).param == "logit_bias.5"


TOLERATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "integral floats": ({"max_tokens": 6.0, "n": 2.0, "top_k": 5.0, "seed": 3.0}, {}),
    "a hot model": ({"temperature": 2.5}, {"temperature": 2.5}),
    "a cold model": ({"temperature": 1e-9}, {"temperature": 0.01}),
    "alternatives that nobody asked for": ({"top_logprobs": 0}, {"logprobs": None}),
    "a bias beyond the range": ({"logit_bias": {"5": 250, "6": -1e9}}, {"logit_bias": {5: 100.0, 6: -100.0}}),
    "the best of as many": ({"n": 3, "best_of": 3}, {"n": 3}),
    "words twice": ({"bad_words": ["a", "b", "a"]}, {"bad_words": ("a", "b")}),
    "tokens twice": ({"allowed_token_ids": [9, 5.0, 9]}, {"allowed_token_ids": (9, 5)}),
    "a cut prompt": ({"truncate_prompt_tokens": 7}, {"truncate_prompt_tokens": 7}),
    "shown tokens": ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
    "a kept stop": ({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
}


@pytest.mark.parametrize("name", TOLERATED)
def test_what_servers_take_is_taken(name: str) -> None:
    given, expected = TOLERATED[name]
    expected = expected or {key: int(value) for key, value in given.items()}
    sampling = parse({**CHAT, **given}).sampling
    found = {key: getattr(sampling, key) for key in expected}
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


def test_completions_take_boolean_logprobs_as_vllm_does() -> None:
    assert parse({**TEXT, "logprobs": True}).sampling.logprobs == 1
    assert parse({**TEXT, "logprobs": False}).sampling.logprobs is None


def test_a_misspelt_parameter_is_told_its_right_name() -> None:
    assert "did you mean max_tokens?" in refusal(batch_line("a", {**CHAT, "max_token": 5})).message
    assert "did you mean" not in refusal(batch_line("a", {**CHAT, "zzzzz": 5})).message


def test_a_stream_is_refused_with_the_reason() -> None:
    assert "whole responses" in refusal(batch_line("a", {**CHAT, "stream": True})).message


def test_integral_floats_are_token_ids() -> None:
    (prompt,) = parse({"prompt": [5.0, 6]}).prompts
    assert prompt == (5, 6)
    assert all(type(token_id) is int for token_id in prompt)


@pytest.mark.parametrize("name", CHAT_UNSUPPORTED)
def test_a_refusal_gives_the_reason(name: str) -> None:
    rule, message = CHAT_UNSUPPORTED[name], refusal(batch_line("a", {**CHAT, name: "never neutral"})).message
    assert message.startswith(f"{name} is 'never neutral', which is not supported: {rule.why}; ")
    assert message.endswith(rule.instead or ("remove it" if not rule.neutral else json.dumps(rule.neutral[-1])))


def test_beam_search_is_refused_with_the_reason() -> None:
    for asked in ({"use_beam_search": True, "n": 4, "temperature": 0}, {"length_penalty": 0.8}):
        assert "there is no beam search" in refusal(batch_line("a", {**TEXT, **asked})).message
    assert parse({**CHAT, "use_beam_search": False, "length_penalty": 1.0}) == parse(CHAT)

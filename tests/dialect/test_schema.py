"""One line: its envelope, its prompts and its messages, and which of them a refusal names."""

from __future__ import annotations

from typing import Any

import pytest
from batch_fakes import SERVED, batch_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parsed_lines import CHAT, parse, refusal

from blendserve.dialect.schema import ServedModel, parse_line
from blendserve.errors import RequestError
from blendserve.models.conversation import Conversation

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ("hi",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        ([[1, 2], "b"], ((1, 2), "b")),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: Any, expected: tuple[Any, ...]) -> None:
    line = parse({"prompt": prompt, "n": 3})
    assert line.prompts == expected
    assert line.num_choices == 3 * len(expected)


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], [[]], [[], "a"], 5, {"a": 1}, [1, "a"], [1.5], [True], [256], [[256]], ["a"] * 2049, [None]],
)
def test_prompts_that_are_none(prompt: Any) -> None:
    error = refusal(batch_line("a", {"prompt": prompt}))
    assert error.param is not None
    assert error.param.startswith("prompt")


def test_messages_keep_roles_and_text_parts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    line = parse(
        {
            "messages": [
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "", "refusal": None, "tool_calls": []},
            ]
        }
    )
    messages = (
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": ""},
    )
    assert line.prompts == (Conversation(messages),)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "function", "content": "x"}], "messages[0].role"),
        ({"role": "user", "content": "x"}, "messages"),
        ([{"role": "user", "content": {"text": "x"}}], "messages[0].content"),
        ([{"role": "user", "content": 4}], "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
        ([{"role": "user", "content": "x", "contents": "y"}], "messages[0].contents"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "id": 5}]}], "messages[0].tool_calls[0].id"),
    ],
)
def test_messages_that_are_none(messages: Any, param: str) -> None:
    assert refusal(batch_line("a", {"messages": messages})).param == param


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"custom_id": None}, "missing_required_parameter"),
        ({"custom_id": ""}, "invalid_custom_id"),
        ({"custom_id": 7}, "invalid_custom_id"),
        ({"method": "GET"}, "invalid_method"),
        ({"method": None}, "invalid_method"),
        ({"url": "/v1/moderations"}, "invalid_url"),
        ({"url": "/v1/files"}, "invalid_url"),
        ({"url": "/chat/completions" * 100}, "invalid_url"),
        ({"url": "v1/chat/completions"}, "invalid_url"),
        ({"url": None}, "invalid_url"),
        ({"body": None}, "missing_required_parameter"),
        ({"body": []}, "missing_required_parameter"),
        ({"max_tokens": 5}, "unknown_parameter"),
    ],
)
def test_what_never_became_a_request_has_no_status(changes: dict[str, Any], code: str) -> None:
    error = refusal({**batch_line("a"), **changes})
    assert (error.code, error.status_code, error.param) == (code, 0, next(iter(changes)))


@pytest.mark.parametrize("value", [None, 5, "x", [], True, 1.5])
def test_a_line_that_is_no_object(value: object) -> None:
    assert refusal(value).code == "invalid_json_line"


def test_notes_beside_the_body_are_the_users_own() -> None:
    assert parse(CHAT, note="keep", metadata={"a": 1}) == parse(CHAT)


def test_a_model_is_taken_by_each_of_its_names_and_no_other_unless_chosen() -> None:
    assert parse({**CHAT, "model": "models/tiny"}).model == "models/tiny"
    assert parse({**CHAT, "model": None}).model is None
    error = refusal(batch_line("a", {**CHAT, "model": "gpt-4o-mini"}))
    assert (error.code, error.status_code) == ("model_not_found", 404)
    chosen = ServedModel(("tiny",), accepts_any_name=True)
    assert parse_line(batch_line("a", {**CHAT, "model": "gpt-4o-mini"}), 1, chosen).model == "gpt-4o-mini"
    assert refusal(batch_line("a", {**CHAT, "model": 5}), chosen).code == "invalid_type"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    ["messages", "prompt", "stop", "logit_bias", "n", "tools", "logprobs", "max_tokens", "stop_token_ids"]
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(names, json_values, max_size=4), st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
def test_no_body_raises_anything_but_a_request_error(body: dict[str, Any], url: str) -> None:
    try:
        line = parse_line({"custom_id": "a", "method": "POST", "url": url, "body": body}, 1, SERVED)
    except RequestError:
        return
    assert line.num_choices >= 1

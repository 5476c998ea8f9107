"""Lines for another server: what is checked, what passes through, and what planning makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from blendserve.dialect.passthrough import parse_remote_line
from blendserve.dialect.schema import BatchLine, ServedModel
from blendserve.errors import RequestError
from blendserve.models.conversation import Conversation

ANY = ServedModel(("any",), accepts_any_name=True, is_remote=True)
NAMED = ServedModel(("big",), is_remote=True)


def parse(body: Any, served: ServedModel = ANY, url: str = "/v1/chat/completions", **fields: Any) -> BatchLine:
    return parse_remote_line({"custom_id": "a", "method": "POST", "url": url, "body": body, **fields}, 7, served)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "x", "messages": []},
        {"messages": "words"},
        {"messages": [1, None, {"role": "user"}, {"role": "user", "content": [{"type": "text", "text": None}, 3]}]},
        {
            "messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}],
            "tools": [{"f": 1}],
            "tool_choice": "any",
        },
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:..."}}]}]},
        {"temperature": "hot", "n": -4, "max_tokens": 1.5, "stop": 9, "response_format": {"type": "json_schema"}},
        {"model": 5, "stream": False, "ünknown": "\u2028"},
    ],
)
def test_bodies_pass_through_whatever_they_hold(body: dict[str, Any]) -> None:
    line = parse(body)
    assert json.loads(line.body) == body
    assert line.num_choices == 1
    assert line.prompts[0]


def test_a_named_model_replaces_the_lines_own() -> None:
    assert json.loads(parse({"model": "x", "a": 1}, NAMED).body) == {"model": "big", "a": 1}
    assert json.loads(parse({"a": 1}, NAMED).body) == {"a": 1, "model": "big"}
    assert parse({"model": "x"}, NAMED).model == "x"


@pytest.mark.parametrize(
    ("body", "fields", "code"),
    [
        ([], {}, "missing_required_parameter"),
        ({"stream": True}, {}, "unsupported_parameter"),
        ({"x": float("inf")}, {}, "invalid_value"),
        ({}, {"custom_id": ""}, "invalid_custom_id"),
        ({}, {"method": "GET"}, "invalid_method"),
        ({}, {"url": "v1/rerank"}, "invalid_url"),
        ({}, {"url": "/v1/../files"}, "invalid_url"),
        ({}, {"url": "http://["}, "invalid_url"),
        ({}, {"max_tokens": 4}, "unknown_parameter"),
    ],
)
def test_a_bad_envelope_is_refused(body: Any, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body, **fields)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("body", "max_tokens"),
    [
        ({"prompt": "a"}, 16),
        ({"prompt": "a", "max_tokens": 5, "n": 3}, 15),
        ({"prompt": "a", "max_tokens": 5.0, "n": 2.0}, 10),
        ({"prompt": ["a", "b"], "max_tokens": 5, "n": 3}, 30),
        ({"prompt": [1, 2, 3], "max_tokens": 5}, 5),
        ({"prompt": [[1, 2], [3]], "max_completion_tokens": 7, "max_tokens": 5}, 14),
        ({"prompt": "a", "max_tokens": 2**31 - 1, "n": 100}, 2**31 - 1),
        ({"prompt": "a", "max_tokens": "many", "n": True}, 16),
    ],
)
def test_the_limit_is_that_of_all_choices_together(body: dict[str, Any], max_tokens: int) -> None:
    line = parse(body, url="/v1/completions")
    assert line.sampling.max_tokens == max_tokens
    assert line.num_choices == 1


def test_prompts_for_planning() -> None:
    assert parse({"prompt": [1, 2, 3]}, url="/v1/completions").prompts == ((1, 2, 3),)
    assert parse({"prompt": ["a", "b"]}, url="/v1/completions").prompts == ("a\nb",)
    assert parse({"prompt": ""}, url="/v1/completions").prompts == (" ",)
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:" + "x" * 10_000}}]
    (prompt,) = parse({"messages": [{"role": "user", "content": parts}], "tools": [1]}).prompts
    assert isinstance(prompt, Conversation)
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    assert len(str(prompt)) < 500, "an image counts as its digest"


def test_known_lengths_are_seen() -> None:
    assert parse({"max_tokens": 5, "ignore_eos": True}).sampling.ignore_eos
    assert not parse({"max_tokens": 5, "ignore_eos": True, "stop": "x"}).sampling.ignore_eos
    assert parse({"max_tokens": 5, "min_tokens": 5, "n": 2}).sampling.min_tokens == 10


@pytest.mark.parametrize(
    ("url", "body", "prompt", "max_tokens"),
    [
        ("/v1/embeddings", {"input": ["one", "two"]}, "one\ntwo", 1),
        ("/v1/embeddings", {"input": [1, 2, 3]}, (1, 2, 3), 1),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 9}, "Hello", 9),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], "instructions": "Short."},
            Conversation(({"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"})),
            None,
        ),
        ("/v1/moderations", {"input": "Hello"}, "Hello", 1),
        ("/rerank", {"query": "q", "documents": ["d"]}, '{"query": "q", "documents": ["d"]}', 1),
        ("/score", {"text_1": "a", "text_2": "b"}, '{"text_1": "a", "text_2": "b"}', 1),
    ],
)
def test_any_endpoint_of_the_server_is_passed_on(url: str, body: dict[str, Any], prompt: Any, max_tokens: Any) -> None:
    line = parse(body, url=url)
    assert (line.url, line.prompts, line.sampling.max_tokens) == (url, (prompt,), max_tokens)
    assert json.loads(line.body) == body, "the body is the user's own"

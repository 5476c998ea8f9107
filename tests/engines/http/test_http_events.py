"""A stream that nobody asked for becomes the body that the server would have sent whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from blendserve.dialect.urls import CHAT_URL
from blendserve.engines.http.bodies import json_of
from blendserve.engines.http.client import Reply
from blendserve.engines.http.replies import Answer, Failure, judge

HEAD = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def stream(*events: Any, has_end: bool = True) -> str:
    texts = [json.dumps(event) for event in events] + (["[DONE]"] if has_end else [])
    return "".join(f"event: message\ndata: {text}\n\n" for text in texts)


def delta(finish: str | None = None, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {**HEAD, "choices": [{"index": index, "delta": fields, "finish_reason": finish}], "usage": None}


def call(index: int, **fields: Any) -> dict[str, Any]:
    return {"index": index, **fields}


def test_parts_are_put_together() -> None:
    parts = (
        delta(role="assistant", content=""),
        delta(content="El"),
        delta(content="Oder", index=1),
        delta(content="be"),
        delta("stop"),
        delta("length", index=1),
        {**HEAD, "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    )
    body = json_of(": keep-alive\n\n" + stream(*parts))
    assert body["object"] == "chat.completion"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}
    assert [(one["message"]["content"], one["finish_reason"]) for one in body["choices"]] == [
        ("Elbe", "stop"),
        ("Oder", "length"),
    ]
    verdict = judge(Reply(200, {}, stream(*parts)), 0.0, CHAT_URL)
    assert isinstance(verdict, Answer)
    assert (verdict.problem, verdict.num_prompt_tokens) == (None, 3)


def test_calls_reasoning_and_log_probabilities_are_put_together() -> None:
    function = {"name": "find", "arguments": ""}
    body = json_of(
        stream(
            delta(reasoning_content="a "),
            delta(reasoning_content="river"),
            delta(tool_calls=[call(0, id="x", type="function", function=function)]),
            delta(tool_calls=[call(0, function={"arguments": '{"a": '}), call(1, id="y", function=function)]),
            delta("tool_calls", tool_calls=[call(0, function={"arguments": "1}"})]),
            {
                **HEAD,
                "choices": [{"index": 0, "logprobs": {"content": [1]}}, {"index": 0, "logprobs": {"content": [2]}}],
            },
        )
    )
    (choice,) = body["choices"]
    assert choice["message"]["reasoning_content"] == "a river"
    assert [(one["id"], one["function"]["arguments"]) for one in choice["message"]["tool_calls"]] == [
        ("x", '{"a": 1}'),
        ("y", ""),
    ]
    assert choice["logprobs"] == {"content": [1, 2]}


def test_completions_are_texts() -> None:
    parts = [{"object": "text_completion", "choices": [{"index": 0, "text": text}]} for text in ("El", "be")]
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
    body = json_of(stream(*parts, end))
    assert (body["object"], body["choices"][0]["text"]) == ("text_completion", "Elbe")


@pytest.mark.parametrize(
    "text",
    [
        stream(delta(content="El"), has_end=False),
        stream(5),
        stream({"choices": [5]}),
        stream({"choices": [{"delta": {"tool_calls": [{"index": 7}]}}]}),
        stream(),
        "data: {",
        "event: ping\n\n",
    ],
)
def test_what_is_no_whole_answer_is_asked_for_again(text: str) -> None:
    assert isinstance(judge(Reply(200, {}, text), 0.0, CHAT_URL), Failure)


def test_an_error_among_the_events_keeps_its_words() -> None:
    verdict = judge(
        Reply(200, {}, stream(delta(content="El"), {"error": {"message": "too long", "code": 400}})), 0.0, CHAT_URL
    )
    assert isinstance(verdict, Answer)
    assert verdict.problem is not None
    assert "too long" in str(verdict.problem)

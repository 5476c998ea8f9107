"""/v1/responses: what of a body becomes a chat, what is refused by name, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest
from batch_fakes import SERVED, batch_line

from blendserve.dialect.extras import Extras
from blendserve.dialect.responses_input import CHAT_NAMES, FIELDS, chat_body
from blendserve.dialect.schema import BatchLine, parse_line
from blendserve.errors import RequestError

CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
CALL_OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "3"}


def parse(body: dict[str, Any]) -> BatchLine:
    return parse_line(batch_line("a", body, url="/v1/responses"), 1, SERVED)


def messages(given: Any, **fields: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = chat_body({"input": given, **fields})["messages"]
    return found


def refusal(body: dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body)
    return caught.value


def test_a_text_is_a_message_of_the_user_and_instructions_one_of_the_system() -> None:
    assert messages("Hi", instructions="Short.") == [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "Hi"},
    ]


def test_items_are_messages() -> None:
    parts = [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]
    spoken = [{"type": "output_text", "text": "said", "annotations": []}]
    found = messages(
        [
            {"role": "developer", "content": "Rules."},
            {"type": "message", "role": "user", "content": parts},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": spoken},
            {"type": "reasoning", "id": "rs_1", "summary": []},
        ]
    )
    assert found == [
        {"role": "developer", "content": "Rules."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "said"}]},
    ]


def test_calls_that_follow_each_other_are_one_message() -> None:
    found = messages([{"role": "user", "content": "?"}, CALL, {**CALL, "call_id": "c2"}, CALL_OUTPUT])
    assert [message["role"] for message in found] == ["user", "assistant", "tool"]
    assert [call["id"] for call in found[1]["tool_calls"]] == ["c1", "c2"]
    assert found[1]["tool_calls"][0] == {
        "id": "c1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1}'},
    }
    assert found[2] == {"role": "tool", "tool_call_id": "c1", "content": "3"}


def test_reasoning_belongs_to_what_follows_it() -> None:
    thought = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {"role": "assistant", "content": "Yes."}
    assert messages([{"role": "user", "content": "?"}, thought, said])[1:] == [{**said, "reasoning_content": "Hm."}]
    assert messages([{"role": "user", "content": "?"}, thought, CALL])[1]["reasoning_content"] == "Hm."
    assert messages([{"role": "user", "content": "?"}, thought]) == [{"role": "user", "content": "?"}]


def test_settings_are_those_of_a_chat() -> None:
    tool = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}
    shape = {"type": "json_schema", "name": "s", "schema": {"type": "object"}, "strict": True}
    chat = chat_body(
        {
            "input": "x",
            "max_output_tokens": 5,
            "temperature": 0.5,
            "top_p": 0.9,
            "tools": [tool],
            "tool_choice": {"type": "function", "name": "add"},
            "parallel_tool_calls": False,
            "text": {"format": shape},
            "reasoning": {"effort": "low", "summary": "auto"},
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 2,
            "metadata": {"k": "v"},
            "store": True,
        }
    )
    assert chat == {
        "messages": [{"role": "user", "content": "x"}],
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "parallel_tool_calls": False,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True},
        },
        "reasoning_effort": "low",
        "logprobs": True,
        "top_logprobs": 2,
    }
    assert set(CHAT_NAMES.values()) - set(FIELDS) == {"text.format", "reasoning.effort"}


def test_nulls_and_what_changes_nothing_are_taken() -> None:
    nothing = dict.fromkeys(set(FIELDS) - {"input", "model"})
    settings = {
        "stream": False,
        "background": False,
        "truncation": "disabled",
        "store": False,
        "tools": [],
        "include": [],
    }
    assert chat_body({"input": "x", **nothing, **settings}) == chat_body({"input": "x"})
    assert parse({"input": "x", **nothing, **settings}).sampling == parse({"input": "x"}).sampling


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": {"id": "c"}}, "conversation", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"stream": True}, "stream", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "unsupported_parameter"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools[0]", "unsupported_parameter"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice", "unsupported_parameter"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "unsupported_parameter"),
        ({"text": {"verbosity": "high"}}, "text.verbosity", "unsupported_parameter"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "invalid_value"),
        ({"instructions": 5}, "instructions", "invalid_type"),
        ({"max_output_tokens": -1}, "max_output_tokens", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"top_logprobs": 99}, "top_logprobs", "invalid_value"),
        ({"max_tokens": 5}, "max_tokens", "unknown_parameter"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "invalid_type"),
        ({"input": [5]}, "input[0]", "invalid_type"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "unsupported_parameter"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type", "unsupported_parameter"),
        ({"input": [{**CALL, "name": None}]}, "input[0].name", "invalid_type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0]",
            "unsupported_parameter",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(fields: dict[str, Any], param: str, code: str) -> None:
    error = refusal({"input": "x", **fields})
    assert (error.param, error.code) == (param, code)
    assert param.partition("[")[0].partition(".")[0] in error.message


def test_an_answer_repeats_the_settings_of_its_line() -> None:
    line = parse({"input": "x", "instructions": "Short.", "metadata": {"k": "v"}, "temperature": 0.5})
    assert Extras.from_bytes(line.body).echoed == {"instructions": "Short.", "metadata": {"k": "v"}, "temperature": 0.5}

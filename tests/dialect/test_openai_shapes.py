"""Rows held against the types of OpenAI's own client: every field they require, none that they do not know."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_fakes import batch_line, errors_of, mixed_lines, read_rows, run_fake, write_lines

pytest.importorskip("openai", reason="pip install 'blendserve[dev]'")

from openai.types import Completion, CreateEmbeddingResponse, ErrorObject
from openai.types.batch_error import BatchError
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from pydantic import BaseModel, ValidationError

RESPONSE = {
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
    "instructions": "Short.",
    "temperature": 0.5,
    "top_p": 0.5,
    "metadata": {"k": "v"},
    "store": True,
    "text": {"format": {"type": "text"}},
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 2,
}
ERROR_TYPES = {"invalid_request_error", "server_error"}


def held_against(kind: type[BaseModel], value: Any) -> BaseModel:
    """Parse strictly (no number for a text, no text for a number) and look for fields that the type lacks."""
    parsed = kind.model_validate_json(json.dumps(value), strict=True)
    unknown = list(extras(parsed, kind.__name__))
    assert not unknown, unknown
    return parsed


def extras(value: object, place: str) -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from (f"{place}.{name}" for name in value.model_extra or {})
        for name, each in value:
            yield from extras(each, f"{place}.{name}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from extras(each, f"{place}[{number}]")


@pytest.fixture
def rows(tmp_path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Output and error rows of lines of every kind."""
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    lines = [
        *mixed_lines(40),
        batch_line("logprobs", {**chat, "logprobs": True, "top_logprobs": 2}),
        batch_line("logprobs of the sampled tokens", {**chat, "logprobs": True}),
        batch_line("choices", {**chat, "n": 3}),
        batch_line("completion logprobs", {"prompt": "x", "logprobs": 0}),
        batch_line("echo", {"prompt": "abc", "echo": True, "max_tokens": 0}),
        batch_line("response", {"input": "hi"}, url="/v1/responses"),
        batch_line("settings of a response", RESPONSE, url="/v1/responses"),
        *(
            batch_line(
                f"short response {seed}", {"input": "hi", "max_output_tokens": 1, "seed": seed}, url="/v1/responses"
            )
            for seed in range(8)
        ),
        batch_line("embeddings", {"input": ["a", "b"]}),
        batch_line("refused", {**chat, "tools": [{"type": "function"}]}),
        batch_line("wrong type", {**chat, "temperature": "hot"}),
        batch_line("too long", {"prompt": "x" * 5000}),
        batch_line("choices"),
        batch_line("elsewhere", url="/v1/moderations"),
        batch_line("state", {"input": "x", "previous_response_id": "r"}, url="/v1/responses"),
        batch_line("put", method="PUT"),
    ]
    output = tmp_path / "out.jsonl"
    run_fake(write_lines(tmp_path / "in.jsonl", lines), output)
    return read_rows(output), read_rows(errors_of(output))


def test_answers_are_completions_to_openais_client(rows: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    kinds: dict[str, type[BaseModel]] = {
        "chat.completion": ChatCompletion,
        "text_completion": Completion,
        "response": Response,
        "list": CreateEmbeddingResponse,
    }
    seen = []
    for row in rows[0]:
        assert list(row) == ["id", "custom_id", "response", "error"]
        assert list(row["response"]) == ["status_code", "request_id", "body"]
        body = row["response"]["body"]
        seen.append(body["object"])
        parsed = held_against(kinds[body["object"]], body)
        assert parsed.model_dump(exclude_unset=True, by_alias=True) == body, (
            "nothing is lost on the way through the client"
        )
    assert set(seen) == set(kinds)


def test_errors_are_errors_to_openais_client(rows: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    num_responses = 0
    for row in rows[1]:
        assert list(row) == ["id", "custom_id", "response", "error"]
        assert (row["response"] is None) != (row["error"] is None)
        if row["error"]:
            held_against(BatchError, row["error"])
            continue
        num_responses += 1
        assert 400 <= row["response"]["status_code"] < 600
        assert list(row["response"]["body"]) == ["error"]
        error = held_against(ErrorObject, row["response"]["body"]["error"])
        assert error.model_dump()["type"] in ERROR_TYPES
    assert 3 <= num_responses < len(rows[1])


def test_a_field_too_many_or_too_few_is_found(rows: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    body = next(row["response"]["body"] for row in rows[0] if row["response"]["body"]["object"] == "chat.completion")
    with pytest.raises(AssertionError, match=r"choices\[0\].message.mood"):
        held_against(ChatCompletion, json.loads(json.dumps(body).replace('"refusal"', '"mood": 1, "refusal"', 1)))
    with pytest.raises(ValidationError, match="finish_reason"):
        held_against(ChatCompletion, json.loads(json.dumps(body).replace('"finish_reason"', '"end"')))
    with pytest.raises(ValidationError, match="prompt_tokens"):
        held_against(ChatCompletion, {**body, "usage": {**body["usage"], "prompt_tokens": "8"}})


def by_id(rows: list[dict[str, Any]], custom_id: str) -> dict[str, Any]:
    body: dict[str, Any] = next(row["response"]["body"] for row in rows if row["custom_id"] == custom_id)
    return body


def test_a_response_says_whether_it_was_cut(rows: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    short = [by_id(rows[0], f"short response {seed}") for seed in range(8)]
    ends = {"incomplete": {"reason": "max_output_tokens"}, "completed": None}
    assert {response["status"] for response in short} == set(ends), "half of the seeds end in a stop token"
    assert all(response["incomplete_details"] == ends[response["status"]] for response in short)
    assert {response["max_output_tokens"] for response in short} == {1}
    whole = Response.model_validate(by_id(rows[0], "settings of a response"))
    assert (whole.instructions, whole.temperature, whole.metadata) == ("Short.", 0.5, {"k": "v"})
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens


def test_vectors_come_as_numbers_or_as_base64(tmp_path: Path) -> None:
    inputs = {"input": ["a", "b"]}
    lines = [
        batch_line("numbers", inputs),
        batch_line("base64", {**inputs, "encoding_format": "base64"}),
        batch_line("tokens", {"input": [[97], [98]]}),
    ]
    run_fake(write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    rows = read_rows(tmp_path / "out.jsonl")
    numbers, encoded, tokens = (by_id(rows, name)["data"] for name in ("numbers", "base64", "tokens"))
    assert [entry["index"] for entry in numbers] == [0, 1]
    assert numbers == tokens
    for entry, text in zip(numbers, encoded, strict=True):
        assert np.frombuffer(base64.b64decode(text["embedding"]), "<f4").tolist() == entry["embedding"]
    assert by_id(rows, "numbers")["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


def test_scores_of_a_prompt_stand_where_openai_and_vllm_have_them(tmp_path: Path) -> None:
    prompt = {"prompt": ["abc", [100, 101]], "max_tokens": 0}
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "prompt_logprobs": 1}
    lines = [
        batch_line("echo", {**prompt, "echo": True, "logprobs": 1}),
        batch_line("echo alone", {**prompt, "echo": True}),
        batch_line(
            "echo and answer", {"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 2, "ignore_eos": True}
        ),
        batch_line("prompt_logprobs", {**prompt, "prompt_logprobs": 0}),
        batch_line("chat", {**chat, "n": 2}),
    ]
    run_fake(write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    rows = read_rows(tmp_path / "out.jsonl")
    first, second = by_id(rows, "echo")["choices"]
    assert (first["text"], second["text"], first["finish_reason"]) == ("abc", "de", "length")
    assert first["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.0, -2.0],
        "top_logprobs": [None, {"b": -1.0}, {"b": -1.0, "c": -2.0}],
        "text_offset": [0, 1, 2],
    }
    assert by_id(rows, "echo")["usage"]["completion_tokens"] == 0
    assert [choice["logprobs"] for choice in by_id(rows, "echo alone")["choices"]] == [None, None]
    answered = by_id(rows, "echo and answer")["choices"][0]
    assert answered["text"] == "".join(answered["logprobs"]["tokens"])
    assert answered["logprobs"]["token_logprobs"][:4] == [None, -1.0, -2.0, -0.5]
    assert by_id(rows, "prompt_logprobs")["choices"][1]["prompt_logprobs"] == [
        None,
        {"101": {"logprob": -1.0, "rank": None, "decoded_token": "e"}},
    ]
    body = by_id(rows, "chat")
    assert body["prompt_logprobs"][0] is None
    assert set(body["prompt_logprobs"][1]) == {"98", "115"}
    assert [set(choice) for choice in body["choices"]] == [{"index", "message", "logprobs", "finish_reason"}] * 2

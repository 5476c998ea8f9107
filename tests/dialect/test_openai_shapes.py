"""Rows held against the types of OpenAI's own client: every field they require, none that they do not know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import batch_line, errors_of, mixed_lines, read_rows, run_fake, write_lines

pytest.importorskip("openai", reason="pip install 'blendserve[dev]'")

from openai.types import Completion, ErrorObject
from openai.types.batch_error import BatchError
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ValidationError

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
        batch_line("refused", {**chat, "tools": [{"type": "function"}]}),
        batch_line("wrong type", {**chat, "temperature": "hot"}),
        batch_line("too long", {"prompt": "x" * 5000}),
        batch_line("choices"),
        batch_line("elsewhere", url="/v1/embeddings"),
        batch_line("put", method="PUT"),
    ]
    output = tmp_path / "out.jsonl"
    run_fake(write_lines(tmp_path / "in.jsonl", lines), output)
    return read_rows(output), read_rows(errors_of(output))


def test_answers_are_completions_to_openais_client(rows: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    kinds: dict[str, type[BaseModel]] = {"chat.completion": ChatCompletion, "text_completion": Completion}
    seen = []
    for row in rows[0]:
        assert list(row) == ["id", "custom_id", "response", "error"]
        assert list(row["response"]) == ["status_code", "request_id", "body"]
        body = row["response"]["body"]
        seen.append(body["object"])
        parsed = held_against(kinds[body["object"]], body)
        assert parsed.model_dump(exclude_unset=True) == body, "nothing is lost on the way through the client"
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

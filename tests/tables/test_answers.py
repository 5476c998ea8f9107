"""Columns of answers from rows of the journal: vectors, refusals, calls of tools, and what a server makes up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_fakes import SERVED
from table_fakes import TableEngine, run_map, write_parquet

from blendserve.dialect.extras import Abilities
from blendserve.dialect.urls import EMBEDDINGS_URL
from blendserve.errors import RequestError
from blendserve.job.pending import PendingRequests
from blendserve.request import SequenceOutput
from blendserve.tables.answers import AnswerColumns
from blendserve.tables.recipe import Recipe

EMBEDDING = replace(SERVED, abilities=Abilities(urls=(EMBEDDINGS_URL,)))


def vectors(pending: PendingRequests) -> Iterator[SequenceOutput]:
    """A vector of three numbers for each text, its length first; one text fails, and one gets four numbers."""
    for row in range(len(pending)):
        text = bytes(pending[row].prompt_token_ids.tolist()).decode()
        values = np.array([len(text), 0.5, -1, *([9] if text == "four" else [])], np.float32)
        error = RequestError("no", code="invalid_value") if text == "fails" else None
        yield SequenceOutput(
            index=row,
            token_ids=np.zeros(0, np.int32),
            finish_reason="stop" if error is None else "error",
            num_prompt_tokens=len(text),
            num_cached_tokens=0,
            error=error,
            embedding=values,
        )


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl"])
def test_vectors_are_lists_of_fixed_size(tmp_path: Path, suffix: str) -> None:
    source = write_parquet(tmp_path / "in.parquet", pa.table({"text": ["fails", "abc", None, "de", "four"]}))
    output = tmp_path / f"out{suffix}"
    report = run_map(source, output, Recipe(embed_column="text", answer="vector"), TableEngine(vectors, EMBEDDING))
    assert report.notes[0].startswith("1 answers are not what was asked for")
    if suffix == ".parquet":
        found = pq.read_table(output)
        assert found.schema.field("vector").type == pa.list_(pa.float32(), 3)
        assert found["vector"].to_pylist() == [None, [3, 0.5, -1], None, [2, 0.5, -1], None]
        errors = found["error"].to_pylist()
        assert errors[0] == "invalid_value: no"
        assert errors[2].startswith("invalid_row: text is null")
        assert "the vector has 4 numbers, earlier ones have 3" in errors[4]
        assert found["prompt_tokens"].to_pylist() == [None, 3, None, 2, 4]
    if suffix == ".jsonl":
        assert json.loads(output.read_text().splitlines()[1])["vector"] == [3, 0.5, -1]


def test_a_table_without_one_vector_is_written_all_the_same(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", pa.table({"text": ["fails"]}))
    run_map(source, tmp_path / "out.parquet", Recipe(embed_column="text"), TableEngine(vectors, EMBEDDING))
    assert pq.read_table(tmp_path / "out.parquet")["answer"].to_pylist() == [None]


def row(body: Any, status_code: int = 200, error: Any = None) -> bytes:
    return json.dumps({"response": {"status_code": status_code, "body": body}, "error": error}).encode()


def chat(**message: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}


@pytest.mark.parametrize(
    ("body", "value", "error"),
    [
        (chat(content="yes"), "yes", None),
        (chat(content=None, refusal="I must not"), None, "refusal: I must not"),
        (chat(content=None, tool_calls=[{"id": "1"}]), '[{"id": "1"}]', None),
        (chat(content=None), None, None),
        ({}, None, "unreadable_answer: the server's answer is of another form (KeyError('choices'))"),
        ({"choices": []}, None, "unreadable_answer: the server's answer is of another form (IndexError"),
        ({"choices": [None]}, None, "unreadable_answer"),
    ],
)
def test_answers_of_any_server_are_read(body: Any, value: Any, error: str | None) -> None:
    answer = AnswerColumns(Recipe(prompt="x"), []).read(row(body))
    assert answer.value == value
    assert (answer.error or "").startswith(error or "")
    assert (answer.error is None) == (error is None)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (row({"error": {"message": "line 7: too long", "code": "too_long"}}, 400), "too_long: too long"),
        (row({"error": {"message": "busy", "code": None}}, 503), "http_503: busy"),
        (row({"error": "gone"}, 500), "http_500: 'gone'"),
        (b'{"response": null, "error": {"code": "server_error", "message": "line 1: died"}}', "server_error: died"),
    ],
)
def test_errors_are_a_code_and_a_sentence(line: bytes, error: str) -> None:
    assert AnswerColumns(Recipe(prompt="x"), []).read(line).error == error

"""What a plan knows of structured answers: bounds that no answer exceeds, and strata of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blendserve.dialect.grammars import WHITESPACE
from blendserve.dialect.schema import ServedModel, parse_line
from blendserve.job.store import TokenStore
from blendserve.job.store_writer import StoreWriter
from blendserve.planner.strata import Strata, split_by
from blendserve.planner.structures import BLANK_BYTES, most_tokens
from blendserve.planner.table import known_output_tokens, request_table
from blendserve.request import SamplingParams, StructuredOutputs


def bound(schema: dict[str, Any]) -> int | None:
    return most_tokens(StructuredOutputs(json=json.dumps(schema)))


def test_choices_are_bounded_by_their_bytes() -> None:
    assert most_tokens(StructuredOutputs(choice=("yes", "no"))) == 4
    assert most_tokens(StructuredOutputs(choice=("é🙂",))) == 7
    assert most_tokens(StructuredOutputs(choice=("yes",), after="x")) is None
    assert most_tokens(StructuredOutputs(regex="a")) is None
    assert f"{{0,{BLANK_BYTES}}}" in WHITESPACE


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"const": "yes"}, '"yes"'),
        ({"enum": [1, "three", None]}, '"three"'),
        ({"type": "boolean"}, "false"),
        ({"type": ["boolean", "null"]}, "false"),
        ({"type": "integer", "minimum": -5, "maximum": 1234}, "1234"),
        ({"type": "string", "maxLength": 2}, '"\\\\ud83d\\\\ude00\\\\ud83d\\\\ude00"'),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 3}, "[ null , null , null ]"),
        ({"anyOf": [{"type": "null"}, {"const": "long text"}]}, '"long text"'),
        (
            {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": False},
            "{" + " " * 24 + '"a"' + " " * 24 + ":" + " " * 24 + "null" + " " * 24 + "}",
        ),
    ],
)
def test_no_text_that_fits_is_longer(schema: dict[str, Any], text: str) -> None:
    most = bound(schema)
    assert most is not None
    assert len(text.encode()) < most


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "string"},
        {"type": "number"},
        {"type": "integer", "minimum": 0},
        {"type": "array", "items": {"type": "null"}},
        {"type": "array", "maxItems": 3},
        {"type": "object", "properties": {}},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
        {"anyOf": [{"type": "null"}, {"type": "string"}]},
        {"type": "string", "maxLength": 1_000_000},
        {"$ref": "#/$defs/x", "$defs": {"x": {"type": "null"}}},
    ],
)
def test_what_has_no_cheap_bound_has_none(schema: dict[str, Any]) -> None:
    assert bound(schema) is None


def test_a_table_knows_bounds_and_structures() -> None:
    choice, schema = StructuredOutputs(choice=("yes",)), StructuredOutputs(json="{}")
    asked = (None, choice, schema, choice)
    table = request_table([5] * 4, [(SamplingParams(structured_outputs=structure), 100) for structure in asked])
    assert table.max_output_tokens.tolist() == [100, 4, 100, 4]
    assert table.structure is not None
    assert table.structure.tolist() == [0, 1, 2, 1]
    assert request_table([5], [(SamplingParams(), 9)]).structure is None
    fixed = SamplingParams(max_tokens=9, ignore_eos=True)
    assert known_output_tokens(fixed, 9) == 9
    assert known_output_tokens(SamplingParams(max_tokens=9, ignore_eos=True, structured_outputs=choice), 9) == -1


def test_a_store_gives_the_same_table(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store")
    yes = {"guided_choice": ["yes"]}
    bodies: list[dict[str, Any]] = [{}, yes, {"guided_json": {}}, {**yes, "top_k": 3}]
    for number, body in enumerate(bodies):
        value = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", **body}}
        writer.add(parse_line(value, number + 1, ServedModel(("tiny",))), [[1, 2, 3]])
    store = TokenStore.open(tmp_path / "store", writer.finish(), max_model_len=100)
    table = store.table(np.arange(4))
    assert table.max_output_tokens.tolist() == [16, 4, 16, 4]
    assert table.structure is not None
    numbers = table.structure.tolist()
    assert numbers[0] == 0
    assert numbers[1] == numbers[3] != numbers[2]
    assert min(numbers[1:]) > 0
    assert store.table(np.arange(1)).structure is None
    assert store.request(1, 0).sampling.structured_outputs == StructuredOutputs(choice=("yes",))


def test_structures_divide_strata() -> None:
    whole = Strata(np.array([-1]), np.array([0]), np.zeros(400, np.int64))
    split = split_by(whole, np.repeat([0, 7], 200))
    assert len(split) == 3
    assert split.stratum_of.tolist() == [1] * 200 + [2] * 200
    assert split.parent.tolist() == [-1, 0, 0]

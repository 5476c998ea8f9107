"""JSON schemas as Arrow types: what a parsed answer becomes, and which answers are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest
from table_fakes import TableEngine, TextEngine, run_map, write_parquet

from blendserve.errors import ConfigError
from blendserve.tables.api import schema_of_model
from blendserve.tables.recipe import Recipe
from blendserve.tables.typed import shape_of


class Part(pydantic.BaseModel):
    name: str
    share: float | None = None


class Label(pydantic.BaseModel):
    sentiment: Literal["good", "bad"]
    stars: int
    parts: list[Part]
    is_spam: bool | None


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "value": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "kind", "value", "expected"),
    [
        ({"type": "string"}, pa.string(), "x", "x"),
        ({"type": "integer"}, pa.int64(), 3, 3),
        ({"type": "integer"}, pa.int64(), 3.0, 3),
        ({"type": "number"}, pa.float64(), 3, 3.0),
        ({"type": "boolean"}, pa.bool_(), True, True),
        ({"type": "null"}, pa.null(), None, None),
        ({"type": ["string", "null"]}, pa.string(), None, None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, pa.int64(), 1, 1),
        ({"enum": ["a", "b"]}, pa.dictionary(pa.int32(), pa.string()), "b", "b"),
        ({"enum": ["a", None]}, pa.dictionary(pa.int32(), pa.string()), None, None),
        ({"const": "a"}, pa.dictionary(pa.int32(), pa.string()), "a", "a"),
        ({"enum": [1, 2]}, pa.int64(), 2, 2),
        ({"enum": [1, "a"]}, pa.string(), 1, "1"),
        ({"type": "array", "items": {"type": "integer"}}, pa.list_(pa.int64()), [1, 2], [1, 2]),
        ({"type": "array"}, pa.string(), [1, "a"], '[1, "a"]'),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, pa.string(), "x", '"x"'),
        ({"type": "object"}, pa.string(), {"a": 1}, '{"a": 1}'),
        (
            {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
            pa.struct([("next", pa.string()), ("value", pa.int64())]),
            {"next": {"value": 2}, "value": 1},
            {"next": '{"value": 2}', "value": 1},
        ),
    ],
    ids=str,
)
def test_a_schema_becomes_a_type(schema: dict[str, Any], kind: Any, value: Any, expected: Any) -> None:
    shape = shape_of(schema)
    assert shape.type == kind
    array = shape.build([shape.check(value, "it"), None])
    assert array.type == kind
    assert array.to_pylist() == [expected, None]


@pytest.mark.parametrize(
    ("schema", "value", "message"),
    [
        ({"type": "integer"}, True, "it is true, and the schema says integer"),
        ({"type": "integer"}, 1.5, "it is 1.5"),
        ({"type": "integer"}, 2**63, "more than 64 bits"),
        ({"type": "number"}, "1", "it is '1', and the schema says number"),
        ({"type": "null"}, 1, "the schema says null"),
        ({"enum": ["a"]}, "b", "the schema lists 'a'"),
        ({"type": "array", "items": {"type": "string"}}, ["a", 1], r"it\[1\] is 1"),
        ({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}, {}, "it has no a"),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, [], "the schema says object"),
    ],
)
def test_another_shape_is_an_error(schema: dict[str, Any], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape_of(schema).check(value, "it")


def test_references_have_to_lead_somewhere() -> None:
    with pytest.raises(ConfigError, match="refers to '#/x'"):
        shape_of({"$ref": "#/x"})
    with pytest.raises(ConfigError, match="must be a JSON object"):
        shape_of([])  # type: ignore[arg-type]


def test_nested_arrays_are_what_arrow_makes_of_them() -> None:
    shape = shape_of(Label.model_json_schema())
    values = [
        {"sentiment": "good", "stars": 1, "parts": [{"name": "a", "share": 0.5}, {"name": "b"}], "is_spam": None},
        None,
        {"sentiment": "bad", "stars": 2, "parts": [], "is_spam": True},
    ]
    checked = [value and shape.check(value, "it") for value in values]
    plain = pa.array(checked, shape.type)
    plain.validate(full=True)
    built = shape.build(checked)
    built.validate(full=True)
    assert built.to_pylist() == plain.to_pylist()


def answers(prompt: str) -> str:
    """An answer that follows the schema, or does not, as the row's text asks."""
    good = {"sentiment": "good", "stars": 5, "parts": [{"name": "x", "share": None}], "is_spam": False}
    asked = prompt.split("Say ")[1].strip()
    return {"good": json.dumps(good), "text": "I think it is good", "wrong": json.dumps({**good, "stars": "five"})}[
        asked
    ]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl", ".csv"])
def test_answers_are_structures_and_others_cost_their_row(tmp_path: Path, suffix: str) -> None:
    table = pa.table({"text": ["good", "text", "wrong", "good"], "limit": [200, 200, 200, 10]})
    source, output = write_parquet(tmp_path / "in.parquet", table), tmp_path / f"out{suffix}"
    recipe = Recipe(
        prompt="Say {{ text }}", schema=schema_of_model(Label), param_columns={"max_tokens": "limit"}, answer="label"
    )
    report = run_map(source, output, recipe, TableEngine(TextEngine(answers)))
    assert report.notes[0].startswith("3 answers are not what was asked for")
    if suffix == ".parquet":
        found = pq.read_table(output)
        assert found.schema.field("label").type == shape_of(Label.model_json_schema()).type
        rows = found.to_pylist()
        assert rows[0]["label"]["parts"] == [{"name": "x", "share": None}]
        assert [row["label"] is None for row in rows] == [False, True, True, True]
        assert rows[1]["error"].startswith("invalid_answer: Expecting value")
        assert "stars is 'five', and the schema says integer" in rows[2]["error"]
        assert "it was cut off, raise max_tokens" in rows[3]["error"]


def test_unnested_fields_are_columns(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", pa.table({"text": ["good", "text"]}))
    recipe = Recipe(prompt="Say {{ text }}", schema=schema_of_model(Label))
    run_map(source, tmp_path / "out.parquet", recipe, TableEngine(TextEngine(answers)), unnest=True)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column_names[1:5] == ["sentiment", "stars", "parts", "is_spam"]
    assert found["stars"].to_pylist() == [5, None]
    clash = Recipe(prompt="{{ stars }}", schema=schema_of_model(Label))
    other = write_parquet(tmp_path / "other.parquet", pa.table({"stars": [1]}))
    with pytest.raises(ConfigError, match="in a column 'stars', and the table has one"):
        run_map(other, tmp_path / "x.parquet", clash, unnest=True)


def test_a_schema_is_a_dict_or_a_model() -> None:
    with pytest.raises(ConfigError, match="schema is a int"):
        schema_of_model(3)

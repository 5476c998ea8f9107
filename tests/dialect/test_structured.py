"""What a body says of the shape of its answer, by every name it may say it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from blendserve.dialect.extras import Abilities
from blendserve.dialect.parameters import check_params
from blendserve.dialect.schema import BatchLine, ServedModel, parse_line
from blendserve.dialect.structured import MAX_SCHEMA_DEPTH, MAX_STRUCTURE_CHARACTERS, check_structure, strict_schema
from blendserve.errors import RequestError
from blendserve.request import SamplingParams, StructuredOutputs

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
STRICT = {**SCHEMA, "additionalProperties": False, "required": ["a"]}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


def parsed(url: str = "/v1/chat/completions", **body: Any) -> BatchLine:
    prompt = CHAT if url.endswith("chat/completions") else {"prompt": "hello"}
    line = {"custom_id": "a", "method": "POST", "url": url, "body": {**prompt, **body}}
    return parse_line(line, 1, ServedModel(("tiny",)))


def json_schema(**named: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", **named}}}


FORMS = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "structured_outputs": None, "guided_json": None}, None),
    ({"guided_decoding_backend": "xgrammar"}, None),
    ({"guided_whitespace_pattern": " ?"}, None),
    ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True)),
    (json_schema(schema=SCHEMA), StructuredOutputs(json=json.dumps(SCHEMA))),
    (json_schema(schema=SCHEMA, strict=False), StructuredOutputs(json=json.dumps(SCHEMA))),
    (json_schema(schema=SCHEMA, strict=True), StructuredOutputs(json=json.dumps(STRICT))),
    ({"structured_outputs": {"json": SCHEMA}}, StructuredOutputs(json=json.dumps(SCHEMA))),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, StructuredOutputs(json=json.dumps(SCHEMA))),
    ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputs(choice=("a", "b"))),
    ({"structured_outputs": {"regex": "a+", "json": None}}, StructuredOutputs(regex="a+")),
    ({"structured_outputs": {"json_object": True}}, StructuredOutputs(json_object=True)),
    ({"structured_outputs": {"grammar": "root ::= [a]"}}, StructuredOutputs(grammar="root ::= [a]")),
    ({"guided_json": SCHEMA}, StructuredOutputs(json=json.dumps(SCHEMA))),
    ({"guided_regex": "[0-9]"}, StructuredOutputs(regex="[0-9]")),
    ({"guided_choice": ["yes", "no"]}, StructuredOutputs(choice=("yes", "no"))),
    ({"guided_grammar": 'start: "x"'}, StructuredOutputs(grammar='start: "x"')),
    ({"extra_body": {"guided_choice": ["yes", "no"]}}, StructuredOutputs(choice=("yes", "no"))),
    ({"extra_body": {"structured_outputs": {"regex": "a"}}}, StructuredOutputs(regex="a")),
]


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(("body", "structure"), FORMS)
def test_structures_are_read(body: dict[str, Any], structure: StructuredOutputs | None, url: str) -> None:
    assert parsed(url, **body).sampling.structured_outputs == structure


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (json_schema(), "response_format.json_schema"),
        (json_schema(schema=[1]), "response_format.json_schema"),
        (json_schema(schema=SCHEMA, strict="yes"), "response_format.json_schema.strict"),
        (json_schema(schema=nested(MAX_SCHEMA_DEPTH)), "response_format.json_schema.schema"),
        (json_schema(schema={"title": "x" * MAX_STRUCTURE_CHARACTERS}), "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
        ({"structured_outputs": {"lark": "start: A"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_regex": "a" * (MAX_STRUCTURE_CHARACTERS + 1)}, "guided_regex"),
        ({"extra_body": 3}, "extra_body"),
        ({"extra_body": {"max_tokens": 3}, "max_tokens": 3}, "extra_body.max_tokens"),
    ],
)
def test_wrong_structures_are_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refusal:
        parsed(**body)
    assert refusal.value.param == param


def test_a_misplaced_structure_is_not_lost() -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT, "guided_regex": "a"}
    with pytest.raises(RequestError, match="guided_regex stands outside the body"):
        parse_line(line, 1, ServedModel(("tiny",)))


def test_strict_closes_every_object() -> None:
    inner = {"type": "object", "properties": {"d": {"type": "string"}}, "required": []}
    either = {"anyOf": [{"properties": {"c": {}}}, {"enum": [{"properties": {}}]}]}
    schema = {
        "type": "object",
        "properties": {"properties": {"$ref": "#/$defs/p"}, "b": either},
        "$defs": {"p": inner},
    }
    closed = strict_schema(schema)
    assert closed["required"] == ["properties", "b"]
    assert closed["properties"]["b"]["anyOf"][0]["required"] == ["c"]
    assert closed["properties"]["b"]["anyOf"][1] == {"enum": [{"properties": {}}]}
    assert closed["$defs"]["p"] == {**inner, "additionalProperties": False}
    assert "additionalProperties" not in closed["properties"]
    assert strict_schema(closed) == closed


def test_structures_from_python() -> None:
    assert check_structure("s", {"json": SCHEMA}) == StructuredOutputs(json=json.dumps(SCHEMA))
    assert check_structure("s", StructuredOutputs(json=SCHEMA)) == StructuredOutputs(json=json.dumps(SCHEMA))  # type: ignore[arg-type]
    given = StructuredOutputs(lark="start: A", after="</think>")
    assert check_structure("s", given) == given
    assert check_structure("s", {"choice": ("a", "b"), "after": "x"}) == StructuredOutputs(choice=("a", "b"), after="x")
    for wrong in (3, {}, {"regex": "a", "choice": ["b"]}, {"regex": "a", "after": 3}, StructuredOutputs()):
        with pytest.raises(RequestError):
            check_structure("s", wrong)
    params = SamplingParams(structured_outputs=given)
    assert check_params(params, 10).structured_outputs == given


REFUSED = {
    "not": {"not": {"type": "null"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "contains": {"type": "array", "contains": {"type": "null"}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
}


@pytest.mark.parametrize("keyword", REFUSED)
def test_keywords_that_cannot_be_followed_are_named(keyword: str) -> None:
    with pytest.raises(RequestError) as refusal:
        parsed(**json_schema(schema={"type": "object", "properties": {"x": REFUSED[keyword]}}))
    assert refusal.value.code == "unsupported_schema"
    assert refusal.value.param == "response_format"
    assert keyword in refusal.value.message


def test_other_engines_check_structures_themselves() -> None:
    served = ServedModel(("tiny",), abilities=Abilities(checks_grammars=False))
    body = {**CHAT, "guided_json": REFUSED["not"]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    assert parse_line(line, 1, served).sampling.structured_outputs is not None

"""Schemas that nothing finite fits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from blendserve.dialect.endless import endless_reference
from blendserve.dialect.grammars import check_grammar
from blendserve.errors import RequestError
from blendserve.request import StructuredOutputs

NODE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"$ref": "#"}, "#"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "#/$defs/a"),
        (NODE, "#"),
        ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "#"),
        ({"anyOf": [{"$ref": "#"}, {"type": "array", "minItems": 2, "items": {"$ref": "#"}}]}, "#"),
        ({"allOf": [{"type": "object"}, {"$ref": "#"}]}, "#"),
        ({"$defs": {"a/b": {"$ref": "#/$defs/a~1b"}}, "$ref": "#/$defs/a~1b"}, "#/$defs/a~1b"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, None),
        ({**NODE, "required": []}, None),
        ({**NODE, "type": ["object", "null"]}, None),
        ({"type": "array", "items": {"$ref": "#"}}, None),
        ({"properties": {"$ref": {"type": "null"}}, "required": ["$ref"], "type": "object"}, None),
        ({"enum": [{"$ref": "#"}]}, None),
        ({"$ref": "#/$defs/absent"}, None),
        ({"$ref": "https://example.com/a"}, None),
        ({"$defs": {"unused": {"$ref": "#/$defs/unused"}}, "type": "null"}, None),
        ({}, None),
    ],
)
def test_endless_references(schema: dict[str, Any], expected: str | None) -> None:
    assert endless_reference(schema) == expected


def test_a_long_chain_is_followed_quickly() -> None:
    names = [f"n{i}" for i in range(400)]
    links = {name: {"$ref": f"#/$defs/{following}"} for name, following in zip(names, [*names[1:], "n0"], strict=True)}
    assert endless_reference({"$defs": links, "$ref": "#/$defs/n0"}) == "#/$defs/n0"
    assert endless_reference({"$defs": {**links, "n399": {"type": "null"}}, "$ref": "#/$defs/n0"}) is None


def test_it_is_an_error_that_names_the_reference() -> None:
    with pytest.raises(RequestError, match="#/\\$defs/a' leads back to itself") as raised:
        check_grammar(StructuredOutputs(json=json.dumps({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})))
    assert (raised.value.code, raised.value.param) == ("unsupported_schema", "response_format")

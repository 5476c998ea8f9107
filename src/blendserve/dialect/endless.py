"""JSON schemas that nothing fits which ends, such as an object that requires one of its own kind inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

_VALUES = ("enum", "const", "default", "examples", "required")
"""Keywords that hold values and no schemas."""


def endless_reference(schema: Mapping[str, Any]) -> str | None:
    """The first `$ref` of a schema where every JSON that fits would go on for ever; None for other schemas."""
    parts = list(_parts(schema))
    finite: set[int] = set()
    is_growing = True
    while is_growing:
        before = len(finite)
        finite.update(id(part) for part in parts if id(part) not in finite and _ends(part, schema, finite))
        is_growing = len(finite) > before
    return None if id(schema) in finite else next((part["$ref"] for part in parts if "$ref" in part), None)


def _parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Every object of a schema, outer ones first."""
    if isinstance(schema, Mapping):
        yield schema
        for name, part in schema.items():
            if name not in _VALUES:
                yield from _parts(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _parts(part)


def _ends(schema: Mapping[str, Any], root: Mapping[str, Any], finite: set[int]) -> bool:
    """Is there JSON that ends and fits, as far as the parts in `finite` are known to have some?"""
    if "enum" in schema or "const" in schema:
        return True
    needed = [*_listed(schema, "allOf"), *_inside(schema)]
    if isinstance(schema.get("$ref"), str):
        needed.append(_target(root, schema["$ref"]))
    choices = [options for name in ("anyOf", "oneOf") if (options := _listed(schema, name))]
    return all(_is_finite(part, finite) for part in needed) and all(
        any(_is_finite(option, finite) for option in options) for options in choices
    )


def _inside(schema: Mapping[str, Any]) -> Iterator[Any]:
    """Schemas of what has to stand inside."""
    kind, required, properties = schema.get("type"), schema.get("required"), schema.get("properties")
    if kind == "object" and isinstance(required, list) and isinstance(properties, Mapping):
        yield from (properties[name] for name in required if isinstance(name, str) and name in properties)
    if kind == "array" and isinstance(schema.get("minItems"), int) and schema["minItems"] > 0:
        yield schema.get("items")


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    parts = schema.get(name)
    return parts if isinstance(parts, list) else []


def _is_finite(part: Any, finite: set[int]) -> bool:
    return not isinstance(part, Mapping) or id(part) in finite


def _target(root: Any, reference: str) -> Any:
    """What `#/...` points to; None for others, and where nothing is there."""
    if not reference.startswith("#"):
        return None
    found = root
    for name in reference[1:].split("/")[1:]:
        key = unquote(name).replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping):
            found = found.get(key)
        elif isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found

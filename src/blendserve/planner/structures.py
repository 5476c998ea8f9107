"""What a plan may know of structured answers: which requests share a structure, and the most tokens one can have.

A bound counts bytes, for a token has at least one. It is found where a schema says it cheaply: lists of values, numbers
between limits, short strings, closed objects and bounded lists of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from blendserve.request import StructuredOutputs

BLANK_BYTES = 24
"""Most white space between two parts of JSON (`dialect.grammars`)."""
MOST_CHARACTER_BYTES = 12
"""Of one character in a JSON string: two escapes, such as `\\ud83d\\ude00`."""
MAX_BOUND = 1 << 16
"""A larger bound says nothing."""
_REMEMBERED = 256


@lru_cache(maxsize=_REMEMBERED)
def most_tokens(structure: StructuredOutputs) -> int | None:
    """The most output tokens of an answer, the end of text included; None where that is not known."""
    if structure.after:
        return None
    if structure.choice:
        return 1 + max(len(choice.encode()) for choice in structure.choice)
    if structure.json is None:
        return None
    num_bytes = _most_bytes(json.loads(structure.json))
    return None if num_bytes is None or num_bytes > MAX_BOUND else 1 + num_bytes + 2 * BLANK_BYTES


def _most_bytes(schema: Any) -> int | None:
    """Bytes of the longest JSON that fits, white space inside it included."""
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return _literal(schema["const"])
    if "enum" in schema:
        return max(map(_literal, schema["enum"]), default=None)
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return _largest([_most_bytes(part) for part in schema[name]])
    kinds = schema.get("type")
    return _largest([_of_type(kind, schema) for kind in (kinds if isinstance(kinds, list) else [kinds])])


def _of_type(kind: Any, schema: Mapping[str, Any]) -> int | None:
    if kind in ("null", "boolean"):
        return len("false")
    if kind == "integer":
        low, high = schema.get("minimum"), schema.get("maximum")
        is_known = isinstance(low, int) and isinstance(high, int)
        return max(len(str(low)), len(str(high))) if is_known else None
    if kind == "string" and isinstance(schema.get("maxLength"), int):
        return 2 + MOST_CHARACTER_BYTES * int(schema["maxLength"])
    if kind == "array":
        return _of_array(schema)
    return _of_object(schema) if kind == "object" else None


def _of_array(schema: Mapping[str, Any]) -> int | None:
    count, item = schema.get("maxItems"), _most_bytes(schema.get("items"))
    if not isinstance(count, int) or item is None or "prefixItems" in schema:
        return None
    return 2 + BLANK_BYTES + count * (item + 1 + 2 * BLANK_BYTES)


def _of_object(schema: Mapping[str, Any]) -> int | None:
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or schema.get("additionalProperties") is not False:
        return None
    total = 2 + BLANK_BYTES
    if "patternProperties" in schema:
        return None
    for name, part in properties.items():
        value = _most_bytes(part)
        if value is None:
            return None
        total += _literal(name) + value + 2 + 4 * BLANK_BYTES
    return total


def _literal(value: Any) -> int:
    """Bytes of a given value: every character may be escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    num_gaps = 2 * sum(text.count(mark) for mark in "{}[]:,")
    return MOST_CHARACTER_BYTES * len(text) + BLANK_BYTES * num_gaps


def _largest(bounds: list[int | None]) -> int | None:
    known = [bound for bound in bounds if bound is not None]
    return max(known) if known and len(known) == len(bounds) else None

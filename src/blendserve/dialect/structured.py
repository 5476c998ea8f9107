"""What a body says of the shape of its answer -> `StructuredOutputs`, whatever name it says it by.

Read: OpenAI's `response_format`, vLLM's `structured_outputs`, and the older `guided_json`, `guided_regex`,
`guided_choice` and `guided_grammar`. Whether a schema or grammar can be followed is for the engine to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from blendserve.dialect.values import reject
from blendserve.errors import RequestError
from blendserve.request import StructuredOutputs

STRUCTURE_KINDS = ("json", "regex", "choice", "grammar", "json_object")
MAX_STRUCTURE_CHARACTERS = 1 << 18
MAX_SCHEMA_DEPTH = 64
"""Objects and lists within each other. A deeper schema is refused here, before anything recurses through it."""
_GUIDED_NAMES = {f"guided_{kind}": kind for kind in STRUCTURE_KINDS}
_IGNORED_NAMES = ("guided_decoding_backend", "guided_whitespace_pattern")
STRUCTURE_FIELDS = frozenset(("response_format", "structured_outputs", *_GUIDED_NAMES, *_IGNORED_NAMES))
"""Every name of a body that `take_structure` reads."""


def take_structure(body: Mapping[str, Any]) -> tuple[dict[str, Any], StructuredOutputs | None]:
    """A body without what shapes its answer, and that.

    Raises: RequestError for one that is not understood, and for two at once.
    """
    rest = {name: value for name, value in body.items() if name not in STRUCTURE_FIELDS}
    given: dict[str, StructuredOutputs] = {}
    for name in body:
        if name in STRUCTURE_FIELDS and (structure := _read(name, body[name])) is not None:
            given[name] = structure
    if len(given) > 1:
        names = sorted(given)
        raise RequestError(
            f"{' and '.join(names)} both shape the answer; give one of them", code="invalid_value", param=names[-1]
        )
    return rest, next(iter(given.values()), None)


def _read(name: str, value: Any) -> StructuredOutputs | None:
    if value is None or name in _IGNORED_NAMES:
        return None
    if name == "response_format":
        return read_response_format(value)
    if name == "structured_outputs":
        return _read_structured_outputs(name, value)
    return _structure_of(name, _GUIDED_NAMES[name], value)


def read_response_format(value: Any) -> StructuredOutputs | None:
    """OpenAI's `response_format` of a chat; None for free text. Raises: RequestError."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputs(json_object=True)
    if kind != "json_schema":
        reject("response_format", value, "an object of type text, json_object or json_schema")
    return read_json_schema("response_format.json_schema", value.get("json_schema"))


def read_json_schema(name: str, value: Any) -> StructuredOutputs:
    """`{name, schema, strict}`, as `response_format.json_schema` and the `text.format` of /v1/responses hold it.

    Raises: RequestError naming `name`.
    """
    schema = value.get("schema") if isinstance(value, dict) else None
    if not isinstance(schema, dict):
        reject(name, value, 'an object {"name": "...", "schema": {...}}')
    strict = value.get("strict")
    if strict is not None and not isinstance(strict, bool):
        reject(f"{name}.strict", strict, "true or false", code="invalid_type")
    check_schema(f"{name}.schema", schema)
    return StructuredOutputs(json=_limited(f"{name}.schema", _as_text(strict_schema(schema) if strict else schema)))


def strict_schema(schema: Any) -> Any:
    """A schema read as `strict: true` means it: where an object lists its properties, it has all of them and no other.

    What the schema says itself stays.
    """
    if isinstance(schema, list):
        return [strict_schema(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    read = {name: _strict_part(name, part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        read.setdefault("additionalProperties", False)
        read.setdefault("required", list(schema["properties"]))
    return read


def _strict_part(name: str, part: Any) -> Any:
    if name in ("properties", "$defs", "definitions", "patternProperties") and isinstance(part, dict):
        return {key: strict_schema(schema) for key, schema in part.items()}
    return part if name in ("enum", "const", "default", "examples", "required") else strict_schema(part)


def check_schema(name: str, schema: Any) -> None:
    """Raises: RequestError naming `name` where a schema is nested deeper than MAX_SCHEMA_DEPTH."""
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [inner for part in parts for inner in part]
        if not level:
            return
    raise RequestError(
        f"{name} is nested more than {MAX_SCHEMA_DEPTH} deep, which is the limit; flatten it, or use $defs and $ref",
        code="invalid_value",
        param=name,
    )


def _read_structured_outputs(name: str, value: Any) -> StructuredOutputs:
    given = {kind: item for kind, item in value.items() if item is not None} if isinstance(value, dict) else {}
    if len(given) != 1 or next(iter(given)) not in STRUCTURE_KINDS:
        reject(name, value, f"an object with one of {', '.join(STRUCTURE_KINDS)}")
    kind, item = next(iter(given.items()))
    return _structure_of(f"{name}.{kind}", kind, item)


def _structure_of(name: str, kind: str, value: Any) -> StructuredOutputs:
    """One kind of structure. Raises: RequestError naming `name`."""
    if kind == "json":
        return StructuredOutputs(json=_limited(name, _read_schema(name, value)))
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(choice, str) for choice in value):
            reject(name, value, "a list of at least one text", code="invalid_type")
        _limited(name, "".join(value))
        return StructuredOutputs(choice=tuple(value))
    if kind == "json_object":
        if value is not True:
            reject(name, value, "true", code="invalid_type")
        return StructuredOutputs(json_object=True)
    if not isinstance(value, str) or not value:
        reject(name, value, "a text that is not empty", code="invalid_type")
    fields: dict[str, Any] = {kind: _limited(name, value)}
    return StructuredOutputs(**fields)


def _read_schema(name: str, value: Any) -> str:
    """A schema as JSON text, from an object or from such a text."""
    schema = value
    if isinstance(value, str):
        _limited(name, value)
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError):
            reject(name, value, "a JSON schema")
    if not isinstance(schema, dict):
        reject(name, value, "a JSON schema, which is an object", code="invalid_type")
    check_schema(name, schema)
    return _as_text(schema)


def _as_text(schema: Any) -> str:
    return json.dumps(schema, ensure_ascii=False)


def _limited(name: str, text: str) -> str:
    if len(text) > MAX_STRUCTURE_CHARACTERS:
        raise RequestError(
            f"{name} has {len(text)} characters; at most {MAX_STRUCTURE_CHARACTERS}", code="invalid_value", param=name
        )
    return text


def check_structure(name: str, value: Any) -> StructuredOutputs:
    """Hold a structure that came from Python, or from the store, against the rules of a body.

    Takes a `StructuredOutputs` or a mapping of its fields; a schema may be an object. Raises: RequestError.
    """
    values = (
        asdict(value) if isinstance(value, StructuredOutputs) else dict(value) if isinstance(value, Mapping) else {}
    )
    given = {
        kind: _as_list(item)
        for kind, item in values.items()
        if kind not in ("after", "begin") and item not in (None, False, ())
    }
    after = values.get("after") or ""
    if len(given) != 1 or next(iter(given)) not in (*STRUCTURE_KINDS, "lark"):
        reject(name, value, f"a StructuredOutputs with one of {', '.join(STRUCTURE_KINDS)}")
    kind, item = next(iter(given.items()))
    structure = _structure_of(f"{name}.{kind}", kind, item)
    if not isinstance(after, str):
        reject(f"{name}.after", after, "a text", code="invalid_type")
    begin = values.get("begin") or ""
    if not isinstance(begin, str):
        reject(f"{name}.begin", begin, "a text", code="invalid_type")
    return replace(structure, after=after, begin=begin)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

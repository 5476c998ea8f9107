"""JSON schemas as Arrow types, and parsed answers as arrays of them.

Objects become structures, lists lists, enums of texts dictionaries; what has no fixed shape (a union, a recursive
definition, an object of any fields) becomes its JSON text.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa

from blendserve.dialect.values import shown
from blendserve.errors import ConfigError

_MAX_DEPTH = 64


class Shape(ABC):
    """One node of a schema. `type` is its Arrow type; `check` raises ValueError for a value of another shape."""

    type: Any

    @abstractmethod
    def check(self, value: Any, where: str) -> Any:
        """The value as `build` takes it: what the schema leaves out is None."""

    def build(self, values: Sequence[Any]) -> Any:
        """An array of checked values, or None for rows without one."""
        return pa.array(values, self.type)


class _Scalar(Shape):
    def __init__(self, kind: str) -> None:
        self._kind, self._allowed = kind, _PYTHON_BY_KIND[kind]
        self.type = _ARROW_BY_KIND[kind]

    def check(self, value: Any, where: str) -> Any:
        if isinstance(value, bool) != (self._kind == "boolean") or not isinstance(value, self._allowed):
            if not (self._kind == "integer" and isinstance(value, float) and value.is_integer()):
                raise ValueError(f"{where} is {shown(value)}, and the schema says {self._kind}")
            value = int(value)
        if self._kind == "integer" and not -(2**63) <= value < 2**63:
            raise ValueError(f"{where} is {shown(value)}, which has more than 64 bits")
        return float(value) if self._kind == "number" else value


class _Null(Shape):
    type = pa.null()

    def check(self, value: Any, where: str) -> Any:
        if value is not None:
            raise ValueError(f"{where} is {shown(value)}, and the schema says null")


class _Enum(Shape):
    """Texts out of a list. Every array has the same dictionary, as a file of Arrow needs it."""

    def __init__(self, values: Sequence[str]) -> None:
        self.type = pa.dictionary(pa.int32(), pa.string())
        self._index = {value: index for index, value in enumerate(values)}

    def check(self, value: Any, where: str) -> Any:
        if not isinstance(value, str) or value not in self._index:
            raise ValueError(f"{where} is {shown(value)}, and the schema lists {', '.join(map(shown, self._index))}")
        return value

    def build(self, values: Sequence[Any]) -> Any:
        indices = pa.array([None if value is None else self._index[value] for value in values], pa.int32())
        return pa.DictionaryArray.from_arrays(indices, pa.array(list(self._index), pa.string()))


class _Text(Shape):
    """JSON of anything."""

    type = pa.string()

    def check(self, value: Any, where: str) -> Any:  # noqa: ARG002  # nothing is wrong
        return json.dumps(value, ensure_ascii=False)


class _Nullable(Shape):
    def __init__(self, inner: Shape) -> None:
        self._inner, self.type = inner, inner.type

    def check(self, value: Any, where: str) -> Any:
        return None if value is None else self._inner.check(value, where)

    def build(self, values: Sequence[Any]) -> Any:
        return self._inner.build(values)


class _List(Shape):
    def __init__(self, item: Shape) -> None:
        self._item = item
        self.type = pa.list_(item.type)

    def check(self, value: Any, where: str) -> Any:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {shown(value)}, and the schema says array")
        return [self._item.check(item, f"{where}[{index}]") for index, item in enumerate(value)]

    def build(self, values: Sequence[Any]) -> Any:
        ends = accumulate((len(value or ()) for value in values), initial=0)
        items = self._item.build([item for value in values for item in value or ()])
        return pa.ListArray.from_arrays(
            pa.array(list(ends), pa.int32()), items, type=self.type, mask=pa.array([value is None for value in values])
        )


class Object(Shape):
    """A structure of named fields."""

    def __init__(self, fields: Mapping[str, Shape], required: frozenset[str]) -> None:
        self.fields, self._required = fields, required
        self.type = pa.struct([(name, shape.type) for name, shape in fields.items()])

    def check(self, value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {shown(value)}, and the schema says object")
        checked: dict[str, Any] = {}
        for name, shape in self.fields.items():
            if name in value:
                checked[name] = shape.check(value[name], f"{where}.{name}")
            elif name in self._required:
                raise ValueError(f"{where} has no {name}, and the schema requires it")
            else:
                checked[name] = None
        return checked

    def build(self, values: Sequence[Any]) -> Any:
        arrays = [shape.build([value and value[name] for value in values]) for name, shape in self.fields.items()]
        mask = pa.array([value is None for value in values])
        return pa.StructArray.from_arrays(arrays, fields=list(self.type), mask=mask)


_PYTHON_BY_KIND: Mapping[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
_ARROW_BY_KIND = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}


def shape_of(schema: Mapping[str, Any]) -> Shape:
    """The shape that a JSON schema describes. Raises: ConfigError for one that is no schema."""
    if not isinstance(schema, Mapping):
        raise ConfigError(f"--schema is {shown(schema)}; it must be a JSON object, as JSON Schema describes it")
    return _shape(schema, schema, ())


def _shape(schema: Any, root: Mapping[str, Any], refs: tuple[str, ...], depth: int = 0) -> Shape:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return _Text()
    if isinstance(reference := schema.get("$ref"), str):
        target = _Text() if reference in refs else None
        return target or _shape(_resolve(reference, root), root, (*refs, reference), depth + 1)
    if (values := _enum_values(schema)) is not None:
        return _enum(values)
    options = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if options:
        return _union(options, root, refs, depth)
    kind = schema.get("type")
    if isinstance(kind, list):
        return _union([{**schema, "type": one} for one in kind], root, refs, depth)
    if kind == "object" and schema.get("properties"):
        fields = {name: _shape(one, root, refs, depth + 1) for name, one in schema["properties"].items()}
        return Object(fields, frozenset(schema.get("required", ())))
    if kind == "array" and isinstance(schema.get("items"), Mapping) and "prefixItems" not in schema:
        return _List(_shape(schema["items"], root, refs, depth + 1))
    if kind == "null":
        return _Null()
    return _Scalar(kind) if kind in _ARROW_BY_KIND else _Text()


def _union(options: Sequence[Any], root: Mapping[str, Any], refs: tuple[str, ...], depth: int) -> Shape:
    """One shape, or that and null; other unions have no type of their own."""
    rest = [one for one in options if not (isinstance(one, Mapping) and one.get("type") == "null")]
    if not rest:
        return _Null()
    inner = _shape(rest[0], root, refs, depth + 1) if len(rest) == 1 else _Text()
    return _Nullable(inner) if len(rest) < len(options) else inner


def _enum_values(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) and values else None


def _enum(values: Sequence[Any]) -> Shape:
    rest = [value for value in values if value is not None]
    if all(isinstance(value, str) for value in rest) and rest:
        inner: Shape = _Enum(list(dict.fromkeys(rest)))
    elif rest and all(type(value) is int for value in rest):
        inner = _Scalar("integer")
    else:
        return _Text()
    return _Nullable(inner) if len(rest) < len(values) else inner


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference within the schema names. Raises: ConfigError for one that leads nowhere."""
    found: Any = root
    for step in reference.removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or name not in found:
            found = None
            break
        found = found[name]
    if not reference.startswith("#") or found is None:
        raise ConfigError(f"--schema refers to {shown(reference)}, which it does not hold; give one whole schema")
    return found

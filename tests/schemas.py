"""JSON schemas of the kinds that people constrain answers with, written for this project by the categories of
JSONSchemaBench: function calls, event tracking, cluster resources, configuration files, articles, and public schemas
from trivial to hard. Generated from a seed, so that there are as many as a test wants.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]

WORDS = (
    "name", "title", "status", "count", "price", "owner", "region", "email", "tags", "enabled", "kind", "version",
    "path", "color", "address", "note", "level", "author", "score", "unit",
)  # fmt: skip
ENUMS = (
    ["red", "green", "blue"],
    ["GET", "POST", "PUT", "DELETE"],
    ["low", "medium", "high"],
    [1, 2, 3],
    ["yes", "no", None],
    ["ä", "日本", "🙂"],
    [True, "auto"],
)
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "uri")
PATTERNS = (
    "^[a-z]{2,8}$",
    "^[A-Z]{3}-[0-9]{4}$",
    "^v[0-9]+\\.[0-9]+$",
    "^(one|two|three)$",
    "^[0-9a-f]{8}$",
    "^\\d{3}$",
)


class Maker:
    """Draws schemas. Every string has a limit, so that a model with random weights comes to an end now and then."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def words(self, low: int, high: int) -> list[str]:
        return self.random.sample(WORDS, self.random.randint(low, high))

    def text(self) -> Schema:
        low = self.random.randint(0, 3)
        return {"type": "string", "minLength": low, "maxLength": low + self.random.randint(1, 12)}

    def scalar(self) -> Schema:
        make: Callable[[], Schema] = self.random.choice(
            (self.text, self.text, self.integer, self.number, self.boolean, self.choice)
        )
        return make()

    def integer(self) -> Schema:
        low = self.random.randint(-1000, 1000)
        return self.random.choice(
            (
                {"type": "integer"},
                {"type": "integer", "minimum": low, "maximum": low + self.random.randint(0, 5000)},
                {"type": "integer", "exclusiveMinimum": low},
                {"type": "integer", "minimum": 0, "multipleOf": self.random.choice((2, 5, 10))},
            )
        )

    def number(self) -> Schema:
        return self.random.choice(
            (
                {"type": "number"},
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 99.5},
            )
        )

    def boolean(self) -> Schema:
        return {"type": "boolean"}

    def choice(self) -> Schema:
        return {"enum": self.random.choice(ENUMS)}

    def formatted(self) -> Schema:
        return {"type": "string", "format": self.random.choice(FORMATS)}

    def patterned(self) -> Schema:
        return {"type": "string", "pattern": self.random.choice(PATTERNS)}

    def nullable(self, schema: Schema) -> Schema:
        if "type" in schema and isinstance(schema["type"], str) and self.random.random() < 0.5:
            return {**schema, "type": [schema["type"], "null"]}
        return {"anyOf": [schema, {"type": "null"}]}

    def array(self, items: Schema) -> Schema:
        low = self.random.randint(0, 2)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + self.random.randint(0, 3)}

    def object(self, properties: Schema, *, is_closed: bool = True, num_optional: int = 0) -> Schema:
        required = list(properties)[: len(properties) - num_optional]
        schema: Schema = {"type": "object", "properties": properties, "required": required}
        return {**schema, "additionalProperties": False} if is_closed else schema


def trivial(make: Maker) -> Schema:
    """One keyword or two."""
    return make.random.choice(
        (
            {"type": "null"},
            make.scalar(),
            {"const": make.random.choice((1, "x", None, True, [1, "two"], {"a": {"b": []}}))},
            {"type": ["integer", "boolean"]},
            {"type": "array", "maxItems": 2, "items": make.scalar()},
            make.object({word: make.scalar() for word in make.words(1, 2)}),
        )
    )


def easy(make: Maker) -> Schema:
    """Flat objects, some keys optional."""
    properties = {word: make.scalar() for word in make.words(2, 5)}
    return make.object(properties, num_optional=make.random.randint(0, 1))


def medium(make: Maker) -> Schema:
    """Objects within objects, lists of them, formats and patterns."""
    inner = make.object({word: make.random.choice((make.formatted, make.patterned))() for word in make.words(1, 2)})
    properties: Schema = {word: make.scalar() for word in make.words(1, 3)}
    properties |= {"inner": inner, "list": make.array(make.object({"item": make.scalar()}))}
    return make.object(properties, num_optional=make.random.randint(0, 2))


def hard(make: Maker) -> Schema:
    """References, recursion, alternatives, intersections, open objects."""
    kinds = [
        make.object({"kind": {"const": word}, "value": make.scalar()}) for word in make.random.sample(WORDS[:8], 3)
    ]
    tree = {
        "type": "object",
        "properties": {"leaf": make.scalar(), "child": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
        "required": ["leaf", "child"],
        "additionalProperties": False,
    }
    parts: list[Schema] = [
        {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"},
        {"oneOf": kinds},
        {"anyOf": [make.scalar(), make.array(make.scalar())]},
        {"allOf": [make.object({"a": make.scalar()}, is_closed=False), {"required": ["a"]}]},
        {"type": "array", "prefixItems": [make.scalar(), make.scalar()], "items": False, "minItems": 2},
        {
            "type": "object",
            "patternProperties": {"^x_": make.integer()},
            "additionalProperties": False,
            "maxProperties": 2,
        },
        {"type": "object", "additionalProperties": make.boolean(), "maxProperties": 2},
        {"definitions": {"n": make.scalar()}, "type": "array", "items": {"$ref": "#/definitions/n"}, "maxItems": 2},
    ]
    return make.random.choice(parts)


def function_call(make: Maker) -> Schema:
    """The arguments of a tool, described as chat clients describe them."""
    properties: Schema = {}
    for word in make.words(1, 4):
        properties[word] = {**make.scalar(), "description": f"The {word} of what is asked for."}
    if make.random.random() < 0.4:
        properties["options"] = make.object({word: make.scalar() for word in make.words(1, 2)})
    call = {"name": {"const": make.random.choice(("get_weather", "search", "book_table"))}}
    return make.object({**call, "arguments": make.object(properties, num_optional=make.random.randint(0, 1))})


def event(make: Maker) -> Schema:
    """What a web page tells a tracker."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "description": "An event",
        **make.object(
            {
                "event_id": {"type": "string", "format": "uuid"},
                "sent_at": {"type": "string", "format": "date-time"},
                "action": {"type": "string", "enum": ["click", "view", "scroll"]},
                **{word: make.nullable(make.text()) for word in make.words(1, 3)},
                "duration": {"type": ["integer", "null"], "minimum": 0, "maximum": 86400},
            },
            num_optional=make.random.randint(0, 2),
        ),
    }


def resource(make: Maker) -> Schema:
    """Something that a cluster runs."""
    labels = {"type": "object", "additionalProperties": make.text(), "maxProperties": 2}
    container = make.object(
        {
            "image": {"type": "string", "pattern": "^[a-z]{1,12}:[0-9]{1,3}$"},
            "ports": make.array({"type": "integer", "minimum": 1, "maximum": 65535}),
            "pull": {"enum": ["Always", "Never", "IfNotPresent"]},
        },
        num_optional=make.random.randint(0, 1),
    )
    return make.object(
        {
            "apiVersion": {"enum": ["v1", "apps/v1"]},
            "kind": {"const": make.random.choice(("Pod", "Service", "Job"))},
            "metadata": make.object({"name": make.patterned(), "labels": labels}, num_optional=1),
            "spec": make.object({"replicas": make.integer(), "containers": make.array(container)}),
        }
    )


def configuration(make: Maker) -> Schema:
    """A configuration file: nearly everything optional, short and long forms."""
    rule = {"anyOf": [{"enum": ["off", "warn", "error"]}, {"type": "integer", "minimum": 0, "maximum": 2}]}
    properties: Schema = {
        "root": {"type": "boolean"},
        "extends": {"anyOf": [make.text(), make.array(make.text())]},
        "rules": {
            "type": "object",
            "properties": dict.fromkeys(make.words(2, 4), rule),
            "additionalProperties": False,
        },
        **{word: make.scalar() for word in make.words(0, 3)},
    }
    return make.object(properties, num_optional=len(properties))


def article(make: Maker) -> Schema:
    """A piece of a newspaper: a list of elements of several kinds."""
    paragraph = make.object({"type": {"const": "text"}, "content": make.text()})
    picture = make.object(
        {"type": {"const": "image"}, "url": {"type": "string", "format": "uri"}, "width": make.integer()},
        num_optional=1,
    )
    return make.object(
        {
            "headline": make.object({"basic": make.text()}),
            "elements": make.array({"anyOf": [paragraph, picture]}),
            "published": {"type": "string", "format": "date-time"},
            "credits": make.array(make.object({word: make.text() for word in make.words(1, 2)})),
        },
        num_optional=make.random.randint(0, 2),
    )


CATEGORIES = (trivial, easy, medium, hard, function_call, event, resource, configuration, article)


def schemas(count_each: int) -> Iterator[tuple[str, Schema]]:
    """Names and schemas, `count_each` of every category."""
    for category in CATEGORIES:
        for number in range(count_each):
            name = f"{category.__name__}-{number}"
            yield name, category(Maker(name))

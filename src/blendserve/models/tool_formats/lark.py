"""Pieces of grammars of calls, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from blendserve.models.tool_formats.format import CallGrammar, Tool, Wanted

MAX_PARALLEL_CALLS = 32
"""Of a forced answer, so that it ends."""
FREE_TEXT = r"/(?s:.*)/"
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def literal(text: str, special_ids: Mapping[str, int] | None = None) -> str:
    """A text as a grammar has it; the token itself where it is a special one."""
    token_id = (special_ids or {}).get(text)
    return json.dumps(text, ensure_ascii=False) if token_id is None else f"<[{token_id}]>"


def arguments_rule(tool: Tool) -> str:
    """A rule of the JSON of a tool's arguments. Without `strict`, what cannot be enforced of a schema is left out."""
    return json_rule(schema_of(tool), is_strict=tool.is_strict)


def json_rule(schema: Mapping[str, Any], *, is_strict: bool) -> str:
    return "%json " + json.dumps({"x-guidance": {**_SPACING, "lenient": not is_strict}, **schema})


def schema_of(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object; properties that it does not list are left out."""
    if tool.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema: dict[str, Any] = {"type": "object", **tool.parameters}
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def alternatives(wanted: Wanted, rule_of: Callable[[Tool], str], name: str = "call") -> str:
    """A rule `name` of any of the tools, and the rules that it needs."""
    numbered = [(f"{name}_{number}", tool) for number, tool in enumerate(wanted.tools)]
    rules = [f"{name}: " + " | ".join(rule for rule, _ in numbered)]
    for rule, tool in numbered:
        rules += [f"{rule}: {rule_of(tool)}"]
    return "\n".join(rules)


def repeated(first: str, more: str, wanted: Wanted) -> str:
    """One of `first`, and then several of `more` where calls may be parallel."""
    return f"{first} ({more}){{0,{MAX_PARALLEL_CALLS - 1}}}" if wanted.is_parallel else first


def start(rule: str, wanted: Wanted) -> str:
    """The start rule: calls, or what may stand instead."""
    if not wanted.answer_rule:
        return f"start: {rule}"
    return f"start: {rule} | instead\ninstead: {wanted.answer_rule}"


def forced_after(marker: str, body: str, wanted: Wanted) -> str:
    """A grammar of calls that each begin with `marker` and a line break; `body` are the rules of what follows it."""
    begin = literal(marker, wanted.special_ids)
    calls = repeated(f'{begin} "\\n" body', f'"\\n" {begin} "\\n" body', wanted)
    return f"{start(calls, wanted)}\n{body}"


def begun_after(marker: str, body: str, wanted: Wanted) -> CallGrammar:
    """The same for an answer that is free until its first `marker`."""
    begin = literal(marker, wanted.special_ids)
    calls = repeated("body", f'"\\n"? {begin} "\\n" body', wanted)
    return CallGrammar(f"start: {calls}\n{body}", marker)

"""Qwen3-Coder's format: calls in tags, one tag per argument, texts unquoted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from blendserve.models.tool_formats.format import (
    CallGrammar,
    NoCallError,
    ParsedAnswer,
    Tool,
    ToolCall,
    ToolFormat,
    Wanted,
    read_json,
    skip_spaces,
    to_json,
)
from blendserve.models.tool_formats.lark import alternatives, begun_after, forced_after, json_rule, literal, schema_of

BEGIN, END = "<tool_call>", "</tool_call>"
_MAX_COUNTED = 4096
"""Characters of texts whose length a grammar bounds; it grows with them."""
_CALL = re.compile(
    r"(?:<tool_call>\s*)?<function=([^>\n]+)>((?:(?!<function=).)*?)</function>\s*(?:</tool_call>)?", re.DOTALL
)
_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n?((?:(?!<parameter=).)*?)\n?</parameter>", re.DOTALL)


def parse(text: str, tools: Sequence[Tool]) -> ParsedAnswer:
    """Calls by their tags; a schema tells which arguments are texts."""
    by_name = {tool.name: tool for tool in tools}
    calls: list[ToolCall] = []
    rest: list[str] = []
    at = 0
    for match in _CALL.finditer(text):
        name = match[1].strip()
        try:
            call = ToolCall(name, to_json(_arguments(match[2], by_name.get(name))))
        except NoCallError:
            continue
        calls.append(call)
        rest.append(text[at : match.start()])
        at = match.end()
    rest.append(text[at:])
    return ParsedAnswer("".join(rest).strip(), tuple(calls)) if calls else ParsedAnswer(text)


def _arguments(body: str, tool: Tool | None) -> dict[str, Any]:
    if _ARGUMENT.sub("", body).strip():
        raise NoCallError(body)
    properties = _properties(tool)
    return {name: _value(text, properties.get(name)) for name, text in _ARGUMENT.findall(body)}


def _properties(tool: Tool | None) -> Mapping[str, Any]:
    found = (tool.parameters or {}).get("properties") if tool is not None else None
    return found if isinstance(found, Mapping) else {}


def _value(text: str, schema: Any) -> Any:
    """A text where the schema says so or nothing else can be; else the JSON value."""
    kinds = _kinds(schema)
    if kinds == {"string"}:
        return text
    try:
        value, end = read_json(text)
    except NoCallError:
        return text
    if skip_spaces(text, end) < len(text) or (isinstance(value, str) and "string" in kinds):
        return text
    if not kinds:
        return text if schema is None else value
    return value if _kind(value) in kinds or (_kind(value) == "integer" and "number" in kinds) else text


def _kinds(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    kinds = schema.get("type")
    found = {kinds} if isinstance(kinds, str) else {*kinds} if isinstance(kinds, list) else set()
    for key in ("anyOf", "oneOf"):
        for part in schema.get(key) or ():
            found |= _kinds(part)
    for value in schema.get("enum") or ():
        found.add(_kind(value))
    return found


def _kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def forced(wanted: Wanted) -> str:
    return forced_after(BEGIN, _body(wanted), wanted)


def begun(wanted: Wanted) -> CallGrammar:
    return begun_after(BEGIN, _body(wanted), wanted)


def _body(wanted: Wanted) -> str:
    """A call behind its begin marker and a line break, its arguments in the order of the schema."""
    end = literal(END, wanted.special_ids)
    arguments: list[str] = []

    def rule(tool: Tool) -> str:
        required = schema_of(tool).get("required") or ()
        parts = []
        for name, schema in _properties(tool).items():
            rule = f"argument_{len(arguments)}"
            arguments.append(_argument_rules(rule, name, schema, is_strict=tool.is_strict))
            parts.append(rule + ("" if name in required else "?"))
        head = literal(f"<function={tool.name}>\n")
        return f'{head} {" ".join(parts)} "</function>\\n" {end}'

    rules = alternatives(wanted, rule, "body")
    return "\n".join((rules, *arguments))


def _argument_rules(rule: str, name: str, schema: Any, *, is_strict: bool) -> str:
    """A rule of one argument: a text up to the end of its tag, one of some texts, or JSON."""
    head, end = literal(f"<parameter={name}>\n"), literal("\n</parameter>\n")
    if _kinds(schema) != {"string"}:
        value = json_rule(schema if isinstance(schema, Mapping) else {}, is_strict=is_strict)
        return f"{rule}: {head} {value} {end}"
    choices = [choice for choice in schema.get("enum") or () if isinstance(choice, str)]
    if choices:
        return f"{rule}: {head} ({' | '.join(map(literal, choices))}) {end}"
    longest = schema.get("maxLength")
    size = f"{{0,{longest}}}" if type(longest) is int and 0 <= longest <= _MAX_COUNTED else "*"
    return f"{rule}: {head} {rule}_text\n{rule}_text[suffix={end}]: /(?s:.{size})/"


def write_calls(calls: Sequence[ToolCall]) -> str:
    return "\n".join(map(_write, calls))


def _write(call: ToolCall) -> str:
    arguments, _ = read_json(call.arguments)
    lines = [
        f"<parameter={name}>\n{value if isinstance(value, str) else to_json(value)}\n</parameter>\n"
        for name, value in arguments.items()
    ]
    return f"{BEGIN}\n<function={call.name}>\n{''.join(lines)}</function>\n{END}"


def write_result(content: str) -> str:
    return f"<tool_response>\n{content}\n</tool_response>"


QWEN3_CODER = ToolFormat("qwen3_coder", (BEGIN, END), parse, forced, begun, write_calls, write_result)

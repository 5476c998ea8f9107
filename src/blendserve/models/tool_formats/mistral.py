"""Mistral's formats: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`, and now `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

from collections.abc import Sequence

from blendserve.models.tool_formats.format import (
    CallGrammar,
    NoCallError,
    ParsedAnswer,
    Tool,
    ToolCall,
    ToolFormat,
    Wanted,
    call_of,
    read_json,
    skip_spaces,
    to_json,
)
from blendserve.models.tool_formats.lark import alternatives, arguments_rule, literal, repeated, start

BEGIN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


def parse(text: str, tools: Sequence[Tool]) -> ParsedAnswer:  # noqa: ARG001
    """Calls of either form behind their marker."""
    calls: list[ToolCall] = []
    rest: list[str] = []
    at = 0
    while (begin := text.find(BEGIN, at)) >= 0:
        rest.append(text[at:begin])
        try:
            found, at = _read(text, begin + len(BEGIN))
            calls += found
        except NoCallError:
            at = begin + len(BEGIN)
            rest.append(BEGIN)
    rest.append(text[at:])
    return ParsedAnswer("".join(rest).strip(), tuple(calls)) if calls else ParsedAnswer(text)


def _read(text: str, at: int) -> tuple[list[ToolCall], int]:
    at = skip_spaces(text, at)
    if text.startswith("[", at) or text.startswith("{", at):
        value, at = read_json(text, at)
        listed = value if isinstance(value, list) else [value]
        return [call_of(entry, "arguments", "parameters") for entry in listed], at
    begin = text.find("{", at)
    head = text[at:begin] if begin >= 0 else ""
    name = head.split(ARGS)[0].split(CALL_ID)[0].strip()
    if not name or any(character.isspace() for character in name):
        raise NoCallError(head)
    value, end = read_json(text, begin)
    return [call_of({"name": name, "arguments": value}, "arguments")], end


def forced(wanted: Wanted) -> str:
    return f"{start(_calls(wanted, is_begun=False), wanted)}\n{_rules(wanted)}"


def begun(wanted: Wanted) -> CallGrammar:
    return CallGrammar(f"start: {_calls(wanted, is_begun=True)}\n{_rules(wanted)}", BEGIN)


def _calls(wanted: Wanted, *, is_begun: bool) -> str:
    begin = literal(BEGIN, wanted.special_ids)
    if ARGS in wanted.special_ids:
        return repeated("call" if is_begun else f"{begin} call", f"{begin} call", wanted)
    listed = repeated("call", '", " call', wanted)
    return f'{"" if is_begun else begin} " "? "[" {listed} "]"'


def _rules(wanted: Wanted) -> str:
    def named(tool: Tool) -> str:
        return f"{literal(tool.name)} {literal(ARGS, wanted.special_ids)} {arguments_rule(tool)}"

    def listed(tool: Tool) -> str:
        head = literal(f'{{"name": {to_json(tool.name)}, "arguments": ')
        return f'{head} {arguments_rule(tool)} "}}"'

    return alternatives(wanted, named if ARGS in wanted.special_ids else listed)


def write_calls(calls: Sequence[ToolCall]) -> str:
    listed = ", ".join(f'{{"name": {to_json(call.name)}, "arguments": {call.arguments}}}' for call in calls)
    return f"{BEGIN} [{listed}]"


def write_result(content: str) -> str:
    return f"[TOOL_RESULTS] {content}[/TOOL_RESULTS]"


MISTRAL = ToolFormat(
    "mistral", (BEGIN, ARGS, CALL_ID), parse, forced, begun, write_calls, write_result, num_id_characters=9
)

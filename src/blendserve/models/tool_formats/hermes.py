"""Hermes' format, which Qwen 2.5 and 3 have too: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

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
from blendserve.models.tool_formats.lark import alternatives, arguments_rule, begun_after, forced_after, literal

BEGIN, END = "<tool_call>", "</tool_call>"


def parse(text: str, tools: Sequence[Tool]) -> ParsedAnswer:  # noqa: ARG001
    """Calls between their markers; the last one may lack its end."""
    calls: list[ToolCall] = []
    rest: list[str] = []
    at = 0
    while (begin := text.find(BEGIN, at)) >= 0:
        rest.append(text[at:begin])
        try:
            call, at = _read(text, begin + len(BEGIN))
            calls.append(call)
        except NoCallError:
            at = begin + len(BEGIN)
            rest.append(BEGIN)
    rest.append(text[at:])
    return ParsedAnswer("".join(rest).strip(), tuple(calls)) if calls else ParsedAnswer(text)


def _read(text: str, at: int) -> tuple[ToolCall, int]:
    value, at = read_json(text, at)
    call = call_of(value, "arguments", "parameters")
    at = skip_spaces(text, at)
    if text.startswith(END, at):
        return call, at + len(END)
    if at < len(text) and not text.startswith(BEGIN, at):
        raise NoCallError(text[at : at + 20])
    return call, at


def forced(wanted: Wanted) -> str:
    return forced_after(BEGIN, _body(wanted), wanted)


def begun(wanted: Wanted) -> CallGrammar:
    return begun_after(BEGIN, _body(wanted), wanted)


def _body(wanted: Wanted) -> str:
    """A call behind its begin marker and a line break."""
    end = literal(END, wanted.special_ids)

    def rule(tool: Tool) -> str:
        head = literal(f'{{"name": {to_json(tool.name)}, "arguments": ')
        return f'{head} {arguments_rule(tool)} "}}\\n" {end}'

    return alternatives(wanted, rule, "body")


def write_calls(calls: Sequence[ToolCall]) -> str:
    return "\n".join(
        f'{BEGIN}\n{{"name": {to_json(call.name)}, "arguments": {call.arguments}}}\n{END}' for call in calls
    )


def write_result(content: str) -> str:
    return f"<tool_response>\n{content}\n</tool_response>"


HERMES = ToolFormat(
    "hermes", (BEGIN, END, "<tool_response>", "</tool_response>"), parse, forced, begun, write_calls, write_result
)

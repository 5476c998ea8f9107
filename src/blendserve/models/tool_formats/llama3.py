"""Llama 3's format: the whole answer is `{"name": ..., "parameters": {...}}`. It has no parallel calls."""

from __future__ import annotations

import json
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
from blendserve.models.tool_formats.lark import alternatives, arguments_rule, literal, start

TAG = "<|python_tag|>"


def parse(text: str, tools: Sequence[Tool]) -> ParsedAnswer:
    """Calls of known functions, behind the tag or not, with semicolons between them; anything else is text."""
    names = {tool.name for tool in tools}
    at = skip_spaces(text, 0)
    if text.startswith(TAG, at):
        at += len(TAG)
    calls: list[ToolCall] = []
    try:
        while (at := skip_spaces(text, at)) < len(text):
            value, at = read_json(text, at)
            call = call_of(value, "parameters", "arguments")
            if names and call.name not in names:
                raise NoCallError(call.name)
            calls.append(call)
            at = skip_spaces(text, at)
            at += text.startswith(";", at)
    except NoCallError:
        return ParsedAnswer(text)
    return ParsedAnswer("", tuple(calls)) if calls else ParsedAnswer(text)


def forced(wanted: Wanted) -> str:
    return f"{start('call', wanted)}\n{alternatives(wanted, _rule)}"


def begun(wanted: Wanted) -> CallGrammar:
    """Nothing marks a call but that the answer begins with a brace."""
    tag = literal(TAG, wanted.special_ids)
    return CallGrammar(f"start: {tag}? call | TEXT\nTEXT: /([^{{](.|\\n)*)?/\n{alternatives(wanted, _rule)}")


def _rule(tool: Tool) -> str:
    head = literal(f'{{"name": {to_json(tool.name)}, "parameters": ')
    return f'{head} {arguments_rule(tool)} "}}"'


def write_calls(calls: Sequence[ToolCall]) -> str:
    return "; ".join(f'{{"name": {to_json(call.name)}, "parameters": {call.arguments}}}' for call in calls)


def write_result(content: str) -> str:
    return json.dumps({"output": content}, ensure_ascii=False)


LLAMA3 = ToolFormat("llama3", (TAG,), parse, forced, begun, write_calls, write_result)

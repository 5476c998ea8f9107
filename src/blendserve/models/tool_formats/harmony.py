"""gpt-oss' format: an answer is messages on channels. `analysis` is reasoning, `final` the text, `commentary` calls."""

from __future__ import annotations

import re
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
)
from blendserve.models.tool_formats.lark import FREE_TEXT, alternatives, arguments_rule, literal, start

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
_RECIPIENT = "commentary to=functions."
_END = re.compile(r"<\|end\|>|<\|call\|>|<\|return\|>|(?=<\|start\|>)")
_TO = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_ON = re.compile(r"<\|channel\|>\s*(\w+)")


def parse(text: str, tools: Sequence[Tool]) -> ParsedAnswer:  # noqa: ARG001
    """The messages of an answer by channel; a text without any is content."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    at = reasoning_end = 0
    while (begin := text.find(MESSAGE, at)) >= 0:
        head = text[at:begin]
        end = _END.search(text, begin + len(MESSAGE))
        body = text[begin + len(MESSAGE) : end.start() if end is not None else len(text)]
        channel, recipient = _ON.search(head), _TO.search(head)
        if recipient is not None:
            try:
                calls.append(_call(recipient[1], body))
            except NoCallError:
                content.append(text[at : end.end() if end is not None else len(text)])
        elif channel is not None and channel[1] == "analysis":
            reasoning.append(body)
        else:
            content.append(body)
        at = end.end() if end is not None else len(text)
        if channel is not None and channel[1] == "analysis":
            reasoning_end = at
    content.append(text[at:])
    said = "".join(content).strip() if at else text
    return ParsedAnswer(said, tuple(calls), "\n".join(reasoning).strip(), reasoning_end)


def _call(name: str, body: str) -> ToolCall:
    value, end = read_json(body)
    if skip_spaces(body, end) < len(body):
        raise NoCallError(body)
    return call_of({"name": name, "arguments": value}, "arguments")


def forced(wanted: Wanted) -> str:
    """One call, behind reasoning or not; the model's end of a turn follows each call."""
    start_, channel, message = (literal(mark, wanted.special_ids) for mark in (START, CHANNEL, MESSAGE))
    thought = f'{channel} "analysis" {message} THOUGHT {literal(ENDS[0], wanted.special_ids)} {start_} "assistant"'
    head = f"{channel} {literal(_RECIPIENT)}"
    return f"{start(f'thought? {head} call', wanted)}\nthought: {thought}\nTHOUGHT: {FREE_TEXT}\n{_rules(wanted)}"


def begun(wanted: Wanted) -> CallGrammar:
    return CallGrammar(f"start: call\n{_rules(wanted)}", _RECIPIENT)


def _rules(wanted: Wanted) -> str:
    constrain, message = (literal(mark, wanted.special_ids) for mark in (CONSTRAIN, MESSAGE))

    def rule(tool: Tool) -> str:
        return f'{literal(f"{tool.name} ")} {constrain} "json" {message} {arguments_rule(tool)}'

    return alternatives(wanted, rule)


def write_calls(calls: Sequence[ToolCall]) -> str:
    return f"{ENDS[1]}{START}assistant".join(
        f"{CHANNEL}{_RECIPIENT}{call.name} {CONSTRAIN}json{MESSAGE}{call.arguments}" for call in calls
    )


def write_result(content: str) -> str:
    return f"{CHANNEL}commentary{MESSAGE}{content}"


HARMONY = ToolFormat(
    "harmony", (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS), parse, forced, begun, write_calls, write_result
)

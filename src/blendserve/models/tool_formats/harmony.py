"""gpt-oss' format: an answer is messages on channels. `analysis` is reasoning, `final` the text, `commentary` calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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
from blendserve.models.tool_formats.lark import FREE_TEXT, alternatives, arguments_rule, literal, repeated

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
    """Calls, behind reasoning or not. Behind each stands the model's own end of a call; gpt-oss ends its turn there, so
    that it calls once, whatever may come."""
    ends = f"calls | {_said('final', wanted, 'instead')}" if wanted.answer_rule else "calls"
    instead = f"instead: {wanted.answer_rule}\n" if wanted.answer_rule else ""
    return f"start: thought? ({ends})\n{instead}{_thought(wanted)}\n{_calls(wanted)}\n{_rules(wanted)}"


def begun(wanted: Wanted) -> CallGrammar:
    """All of an answer: its messages stand between special tokens, which no free text has."""
    aside = f"({_said('analysis', wanted, 'TEXT')} | {_said('commentary', wanted, 'TEXT')}) {_next(wanted)}"
    start_ = f"start: aside* (calls | {_said('final', wanted, 'TEXT')})\naside: {aside}\nTEXT: {FREE_TEXT}"
    return CallGrammar(f"{start_}\n{_calls(wanted)}\n{_rules(wanted)}")


def answered(rule: str, special_ids: Mapping[str, int]) -> str:
    """A grammar of an answer that `rule` describes, behind reasoning or not."""
    wanted = Wanted((), special_ids=special_ids)
    return f"start: thought? {_said('final', wanted, 'answer')}\nanswer: {rule}\n{_thought(wanted)}"


def _said(channel: str, wanted: Wanted, rule: str) -> str:
    """A message on a channel."""
    return f"{_mark(CHANNEL, wanted)} {literal(channel)} {_mark(MESSAGE, wanted)} {rule}"


def _thought(wanted: Wanted) -> str:
    return f"thought: {_said('analysis', wanted, 'THOUGHT')} {_next(wanted)}\nTHOUGHT: {FREE_TEXT}"


def _next(wanted: Wanted) -> str:
    """Where a message ends and the next one begins."""
    return f'{_mark(ENDS[0], wanted)} {_mark(START, wanted)} "assistant"'


def _calls(wanted: Wanted) -> str:
    head = f"{_mark(CHANNEL, wanted)} {literal(_RECIPIENT)} call"
    again = f'{_mark(ENDS[1], wanted)} {_mark(START, wanted)} "assistant" {head}'
    return f"calls: {repeated(head, again, wanted)}"


def _mark(text: str, wanted: Wanted) -> str:
    return literal(text, wanted.special_ids)


def _rules(wanted: Wanted) -> str:
    constrain, message = _mark(CONSTRAIN, wanted), _mark(MESSAGE, wanted)

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

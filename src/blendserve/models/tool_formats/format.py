"""What a format of tool calls is: how a model writes that it calls functions, and how that is read.

A format is one module of this package; `table` lists them and recognises a model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn


class ToolCall(NamedTuple):
    """One call. `arguments` is the JSON text of an object."""

    name: str
    arguments: str


class ParsedAnswer(NamedTuple):
    """The text of an answer, taken apart. What is no well-formed call stays in `content`. `reasoning_end` is where the
    last reasoning ends in the text.
    """

    content: str
    calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    reasoning_end: int = 0


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called. `parameters` is its JSON schema, None where it has none."""

    name: str
    parameters: Mapping[str, Any] | None = None
    is_strict: bool = False
    description: str = ""

    @classmethod
    def of(cls, tool: Mapping[str, Any]) -> Tool:
        """From OpenAI's form."""
        function = tool["function"]
        return cls(
            function["name"],
            function.get("parameters"),
            function.get("strict") is True,
            function.get("description") or "",
        )


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """A grammar of calls for llguidance. It holds behind the first occurrence of `after`, from the beginning where that
    is empty.
    """

    lark: str
    after: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The calls that a grammar is for. `special_ids` are the ids of those markers that are special tokens, which no
    text can spell. `answer_rule` is a rule of what may stand instead of a call, none where a call is a must.
    """

    tools: Sequence[Tool]
    is_parallel: bool = True
    special_ids: Mapping[str, int] = field(default_factory=dict)
    answer_rule: str = ""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls.

    - `markers`: what calls stand in. Where these are special tokens, they are kept in the text that is parsed.
    - `parse`: the calls of an answer. Never raises.
    - `forced`: a grammar of one call or more. `begun`: a grammar for answers that are free until a call begins.
    - `write_calls`, `write_result`: calls and what came of one, as texts of a history.
    - `num_id_characters`: length of ids of calls; 0 for those of OpenAI.
    """

    name: str
    markers: tuple[str, ...]
    parse: Callable[[str, Sequence[Tool]], ParsedAnswer]
    forced: Callable[[Wanted], str]
    begun: Callable[[Wanted], CallGrammar]
    write_calls: Callable[[Sequence[ToolCall]], str]
    write_result: Callable[[str], str]
    num_id_characters: int = 0


class NoCallError(ValueError):
    """A text that looks like a call and is none."""


def _refuse(name: str) -> NoReturn:
    raise NoCallError(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def read_json(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `at`, behind spaces, and where it ends. Raises: NoCallError."""
    while at < len(text) and text[at].isspace():
        at += 1
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        raise NoCallError(text[at : at + 20]) from None


def skip_spaces(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def call_of(value: Any, *keys: str) -> ToolCall:
    """A call from its JSON object, whose arguments stand under one of `keys`. Raises: NoCallError."""
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        raise NoCallError("no name")
    arguments: Any = next((value[key] for key in keys if key in value), {})
    if isinstance(arguments, str):
        arguments, _ = read_json(arguments)
    if not isinstance(arguments, dict):
        raise NoCallError("arguments are no object")
    return ToolCall(name, to_json(arguments))


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

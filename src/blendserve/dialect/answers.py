"""The answer of a chat, taken apart as its line asks: reasoning, calls and content."""

from __future__ import annotations

from dataclasses import replace

from blendserve.dialect.endpoint import Choice
from blendserve.dialect.tools import read_forced_json


def with_parts(choice: Choice) -> Choice:
    """The same choice with its parts filled in."""
    extras = choice.extras
    parts, num_reasoning_tokens = choice.codec.parts_of(
        choice.prompt_token_ids, choice.output, choice.sampling, extras.tools, may_call=extras.call_form == "text"
    )
    if extras.call_form in ("list", "arguments"):
        parsed = read_forced_json(parts.content, extras.call_form, extras.named)
        parts = parts._replace(content=parsed.content, calls=parsed.calls)
    if not extras.is_parallel:
        parts = parts._replace(calls=parts.calls[:1])
    return replace(choice, parts=parts, num_reasoning_tokens=num_reasoning_tokens)

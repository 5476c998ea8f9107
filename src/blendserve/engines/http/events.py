"""An answer that a server streamed though nobody asked for it: its events put together to one body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_DATA, _DONE = "data:", "[DONE]"
_WHOLE_BY_CHUNK = {"chat.completion.chunk": "chat.completion"}


def is_stream(text: str) -> bool:
    """Does a body begin as a stream of events?"""
    return text.startswith((_DATA, "event:", "id:", "retry:"))


def body_of_events(text: str) -> dict[str, Any]:
    """The body that the same server would have sent whole. Raises: ValueError where an event is no part of one, or the
    last is missing.
    """
    texts = [line.removeprefix(_DATA).strip() for line in text.splitlines() if line.startswith(_DATA)]
    try:
        return _joined([json.loads(text) for text in texts if text != _DONE])
    except (TypeError, AttributeError, KeyError, IndexError):
        raise ValueError("a stream of events that are no parts of an answer") from None


def _joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    body: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("error"):
            return event
        body |= {name: value for name, value in event.items() if value is not None}
        for part in event.get("choices") or ():
            index = part.get("index", 0)
            _add_choice(choices.setdefault(index, {"index": index}), part)
    if not choices or any(choice.get("finish_reason") is None for choice in choices.values()):
        raise ValueError("a stream of events without its end")
    body["object"] = _WHOLE_BY_CHUNK.get(body.get("object", ""), body.get("object"))
    return body | {"choices": [choices[index] for index in sorted(choices)]}


def _add_choice(choice: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Mutates: `choice`."""
    for name, value in part.items():
        if name == "delta":
            _add_delta(choice.setdefault("message", {"role": "assistant", "content": None}), value or {})
        elif name == "text":
            choice["text"] = choice.get("text", "") + (value or "")
        elif name == "logprobs" and value:
            kept = choice.setdefault("logprobs", {})
            kept |= {key: kept.get(key, []) + listed for key, listed in value.items() if listed is not None}
        elif name != "index" and (value is not None or name not in choice):
            choice[name] = value


def _add_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Mutates: `message`."""
    for name, value in delta.items():
        if name == "tool_calls":
            for part in value or ():
                _add_call(message.setdefault(name, []), part)
        elif name != "role" and isinstance(value, str):
            message[name] = (message.get(name) or "") + value
        elif value is not None:
            message[name] = value


def _add_call(calls: list[dict[str, Any]], part: Mapping[str, Any]) -> None:
    """Mutates: `calls`. The parts of a call have its number; the first also its id and the function's name."""
    index = part.get("index", len(calls))
    if index == len(calls):
        calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
    call, function = calls[index], part.get("function") or {}
    call |= {name: part[name] for name in ("id", "type") if part.get(name)}
    for name in ("name", "arguments"):
        call["function"][name] += function.get(name) or ""

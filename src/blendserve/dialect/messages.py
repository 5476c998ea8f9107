"""The messages of a conversation, as a body or a Python caller gives them -> as a chat template takes them.

The one reader for batch lines and for `LLM.chat`. Where OpenAI and vLLM differ, both spellings are taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from blendserve.dialect.extras import Abilities, take_pictures
from blendserve.dialect.values import reject, shown
from blendserve.errors import RequestError
from blendserve.models.conversation import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_KEYS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of parts that are text, with the key that the text stands under."""
_IGNORED_FIELDS = frozenset(
    (
        *("id", "object", "status", "type", "created", "timestamp", "weight", "metadata", "cache_control", "index"),
        *("refusal", "annotations", "logprobs", "finish_reason", "stop_reason"),
    )
)
"""What clients and logs write beside a message: any value, no place in a prompt."""
_EMPTY_FIELDS = ("audio", "function_call")
"""Taken only where they hold nothing."""
_READ_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content", "thinking")


def read_conversation(body: Mapping[str, Any], abilities: Abilities) -> tuple[tuple[Message, ...], bool]:
    """The messages of a body with what a plan needs of their pictures, and whether there are any."""
    if not abilities.sees:
        return read_messages(body.get("messages")), False
    texts, pictures = take_pictures(body.get("messages"), abilities.image_domains)
    messages = read_messages(texts)
    pictured = tuple(
        {**message, "pictures": " ".join(picture.to_text() for picture in of_message)} if of_message else message
        for message, of_message in zip(messages, pictures, strict=True)
    )
    return pictured, any(pictures)


def read_messages(messages: Any, name: str = "messages") -> tuple[Message, ...]:
    """A list of messages. Raises: RequestError naming the first part that is wrong; `name` is what it is called."""
    if messages is None:
        raise RequestError(f"{name} is missing", code="missing_required_parameter", param=name)
    if isinstance(messages, Mapping):
        reject(name, messages, "a list of messages, not one message: put it in brackets", code="invalid_type")
    if not isinstance(messages, list | tuple) or not messages:
        reject(name, messages, "a list of at least one message", code="invalid_type")
    return tuple(_read_message(f"{name}[{index}]", message) for index, message in enumerate(messages))


def _read_message(name: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        reject(name, message, 'an object such as {"role": "user", "content": "..."}', code="invalid_type")
    role = message.get("role")
    if role == "function":
        _refuse_old(f"{name}.role", 'role "tool" with the tool_call_id of the call that it answers')
    if not isinstance(role, str) or role not in ROLES:
        reject(f"{name}.role", role, f"one of {', '.join(ROLES)}")
    if len(message) > 2:
        _check_fields(name, message)
    calls = read_tool_calls(f"{name}.tool_calls", message.get("tool_calls")) if role == "assistant" else ()
    read: dict[str, Any] = {"role": role, "content": _read_content(name, role, message)}
    if calls:
        read["tool_calls"] = calls
    return read | _read_texts(name, message)


def _check_fields(name: str, message: Mapping[str, Any]) -> None:
    for field, value in message.items():
        if field in _READ_FIELDS or field in _IGNORED_FIELDS or (value in (None, [], {}) and field in _EMPTY_FIELDS):
            continue
        if field == "function_call":
            _refuse_old(f"{name}.function_call", "tool_calls")
        raise RequestError(
            f"{name}.{field[:100]} is {shown(value)}, which has no place in a prompt; remove it",
            code="unsupported_parameter" if field in _EMPTY_FIELDS else "unknown_parameter",
            param=f"{name}.{field[:100]}",
        )
    if message.get("role") != "assistant" and message.get("tool_calls"):
        reject(f"{name}.tool_calls", message["tool_calls"], "in a message of role assistant")


def _refuse_old(name: str, new: str) -> NoReturn:
    raise RequestError(
        f"{name} is OpenAI's old way to call functions; write {new}", code="unsupported_parameter", param=name
    )


def _read_texts(name: str, message: Mapping[str, Any]) -> dict[str, str]:
    """Name, reasoning and the id of the call that is answered, each where it is given."""
    read: dict[str, str] = {}
    for field in ("name", "tool_call_id", "thinking", "reasoning", "reasoning_content"):
        value = message.get(field)
        if value is None:
            continue
        if not isinstance(value, str):
            reject(f"{name}.{field}", value, "a text", code="invalid_type")
        read["reasoning_content" if field in ("thinking", "reasoning") else field] = value
    return read


def _read_content(name: str, role: str, message: Mapping[str, Any]) -> str | list[dict[str, str]]:
    """A text, or its parts. An assistant may say nothing, as with vLLM, and does so beside its calls."""
    content = message.get("content")
    name = f"{name}.content"
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        refusal = message.get("refusal")
        return refusal if isinstance(refusal, str) else ""
    if not isinstance(content, list | tuple) or not (content or role == "assistant"):
        reject(name, content, "a text or a list of text parts", code="invalid_type")
    return [{"type": "text", "text": _read_part(f"{name}[{index}]", part)} for index, part in enumerate(content)]


def _read_part(name: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind not in _TEXT_KEYS:
        raise RequestError(
            f"{name} is of type {shown(kind)}; this model reads only text parts",
            code="unsupported_parameter",
            param=name,
        )
    text = part.get(_TEXT_KEYS[kind]) if isinstance(kind, str) else None
    if not isinstance(text, str):
        reject(name, part, 'an object {"type": "text", "text": "..."}', code="invalid_type")
    return text


def read_tool_calls(name: str, calls: Any) -> list[dict[str, Any]]:
    """The calls of an assistant, their arguments as an object, which is what templates take. Raises: RequestError."""
    if calls is None:
        return []
    if not isinstance(calls, list | tuple):
        reject(name, calls, "a list of calls", code="invalid_type")
    return [_read_call(f"{name}[{index}]", call) for index, call in enumerate(calls)]


def _read_call(name: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        wanted = '{"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}'
        reject(name, call, f"an object {wanted}", code="invalid_type")
    called = function.get("name")
    if not isinstance(called, str) or not called:
        reject(f"{name}.function.name", called, "the name of a function", code="invalid_type")
    arguments = _read_arguments(f"{name}.function.arguments", function.get("arguments"))
    read: dict[str, Any] = {"type": "function", "function": {"name": called, "arguments": arguments}}
    if (call_id := call.get("id")) is not None:
        if not isinstance(call_id, str):
            reject(f"{name}.id", call_id, "a text", code="invalid_type")
        read = {"id": call_id, **read}
    return read


def _read_arguments(name: str, arguments: Any) -> dict[str, Any]:
    """JSON text of an object, or the object itself; nothing at all counts as no arguments."""
    if arguments is None or arguments == "":
        return {}
    value = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            reject(name, arguments, "the JSON text of an object")
    if not isinstance(value, Mapping):
        reject(name, arguments, "the JSON text of an object")
    return dict(value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")

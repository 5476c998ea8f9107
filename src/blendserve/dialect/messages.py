"""The conversation of a chat body: roles and texts, as a chat template reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blendserve.dialect.extras import Abilities, take_pictures
from blendserve.dialect.parameters import reject, shown
from blendserve.dialect.prompts import Message
from blendserve.errors import RequestError

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_EMPTY_MESSAGE_FIELDS = frozenset(
    ("name", "refusal", "audio", "annotations", "function_call", "tool_calls", "tool_call_id", "reasoning_content")
)


def read_conversation(body: Mapping[str, Any], abilities: Abilities) -> tuple[tuple[Message, ...], bool]:
    """The messages as text, with what a plan needs of their pictures, and whether there are any."""
    if not abilities.sees:
        return _read_messages(body), False
    texts, pictures = take_pictures(body.get("messages"), abilities.image_domains)
    messages = _read_messages({"messages": texts})
    pictured = tuple(
        {**message, "pictures": " ".join(picture.to_text() for picture in of_message)} if of_message else message
        for message, of_message in zip(messages, pictures, strict=True)
    )
    return pictured, any(pictures)


def _read_messages(body: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = body.get("messages")
    if messages is None:
        raise RequestError("messages is missing", code="missing_required_parameter", param="messages")
    if not isinstance(messages, list) or not messages:
        reject("messages", messages, "a list of at least one message", code="invalid_type")
    return tuple(_read_message(f"messages[{index}]", message) for index, message in enumerate(messages))


def _read_message(name: str, message: Any) -> Message:
    if not isinstance(message, dict):
        reject(name, message, "an object", code="invalid_type")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        reject(f"{name}.role", role, f"one of {', '.join(_ROLES)}")
    if len(message) > 2:
        _check_message_fields(name, message)
    return {"role": _ROLES[role], "content": _read_content(f"{name}.content", message.get("content"))}


def _check_message_fields(name: str, message: Mapping[str, Any]) -> None:
    for field, value in message.items():
        if field in ("role", "content") or (field in _EMPTY_MESSAGE_FIELDS and (value is None or value == [])):
            continue
        raise RequestError(
            f"{name}.{field[:100]} is not supported and would change the prompt; remove it",
            code="unsupported_parameter" if field in _EMPTY_MESSAGE_FIELDS else "unknown_parameter",
            param=f"{name}.{field[:100]}",
        )


def _read_content(name: str, content: Any) -> str:
    """A string, or text parts joined by line breaks (as vLLM joins them for text-only templates)."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        reject(name, content, "a string or a list of text parts", code="invalid_type")
    return "\n".join(_read_part(f"{name}[{index}]", part) for index, part in enumerate(content))


def _read_part(name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise RequestError(
            f"{name} is of type {shown(kind)}; this model reads only text parts",
            code="unsupported_parameter",
            param=name,
        )
    text = part.get("text") if kind else None
    if not isinstance(text, str):
        reject(name, part, 'an object {"type": "text", "text": "..."}', code="invalid_type")
    return text

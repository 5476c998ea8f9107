"""/v1/responses without state: read as the chat that asks for the same, answered with items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blendserve.dialect.chat import CHAT
from blendserve.dialect.endpoint import AnsweredLine, Choice, Endpoint, ReadBody, text_usage
from blendserve.dialect.extras import Abilities
from blendserve.dialect.responses_input import CHAT_NAMES, chat_body
from blendserve.dialect.urls import RESPONSES_URL
from blendserve.errors import RequestError

_ECHOED: Mapping[str, Any] = {
    "instructions": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": None,
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "max_output_tokens": None,
    "reasoning": {"effort": None, "summary": None},
    "text": {"format": {"type": "text"}},
    "top_logprobs": None,
    "user": None,
}
"""Settings that a response repeats, and what they are where a body does not give them."""


def _read(body: Mapping[str, Any], abilities: Abilities) -> ReadBody:
    chat = chat_body(body)
    try:
        read = CHAT.read(chat, abilities)
    except RequestError as error:
        raise _renamed(error) from None
    echoed = {name: body[name] for name in _ECHOED if body.get(name) is not None}
    return replace(read, extras=replace(read.extras, echoed=echoed))


def _renamed(error: RequestError) -> RequestError:
    """An error of the chat body, in the names of the user's own."""
    name, separator, rest = (error.param or "").partition("[" if "[" in (error.param or "") else ".")
    own = CHAT_NAMES.get(name)
    if own is None:
        return error
    message = error.message.replace(name, own, 1)
    return RequestError(message, code=error.code, param=own + separator + rest, status_code=error.status_code)


def _choice_body(choice: Choice) -> dict[str, Any]:
    """The chat's message, whose parts become items when the line's key is known."""
    return CHAT.choice_body(choice)


def _body(answered: AnsweredLine) -> dict[str, Any]:
    (choice,) = answered.choices
    is_cut = choice.body["finish_reason"] == "length"
    status = "incomplete" if is_cut else "completed"
    echoed = {**_ECHOED, **(answered.extras.echoed or {})}
    return {
        "id": f"resp_{answered.key}",
        "object": "response",
        "created_at": answered.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "model": answered.model,
        "output": _items(choice.body, answered.key, status),
        "previous_response_id": None,
        "service_tier": "default",
        "truncation": "disabled",
        "usage": _usage(answered),
        **echoed,
        "tools": [{"parameters": None, "strict": None, **tool} for tool in echoed["tools"]],
    }


def _items(choice: Mapping[str, Any], key: str, status: str) -> list[dict[str, Any]]:
    """Reasoning, then text, then calls. An answer of calls alone has no message."""
    message = choice["message"]
    items: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        thought = {"type": "reasoning_text", "text": message["reasoning_content"]}
        items.append({"id": f"rs_{key}", "type": "reasoning", "summary": [], "content": [thought], "status": status})
    calls = message.get("tool_calls") or []
    if message["content"] or not calls:
        text: dict[str, Any] = {"type": "output_text", "text": message["content"] or "", "annotations": []}
        if choice["logprobs"] is not None:
            text["logprobs"] = choice["logprobs"]["content"]
        items.append({"id": f"msg_{key}", "type": "message", "role": "assistant", "status": status, "content": [text]})
    for number, call in enumerate(calls):
        items.append(
            {
                "id": f"fc_{key}_{number}",
                "type": "function_call",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": call["function"]["arguments"],
                "status": status,
            }
        )
    return items


def _usage(answered: AnsweredLine) -> dict[str, Any]:
    usage = text_usage(answered)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
        },
        "total_tokens": usage["total_tokens"],
    }


RESPONSES = Endpoint(RESPONSES_URL, "input", _read, _choice_body, _body, has_parts=True)

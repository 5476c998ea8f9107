"""A line that another server will answer: its envelope is checked here, its body by that server's own rules.

Of the body only what planning needs is read, and never refused: a text that stands for the prompt and a guess of the
output's limit. The server gets the user's own body, `model` replaced where the user named one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

from blendserve.dialect.prompts import Prompt
from blendserve.dialect.schema import BatchLine, ServedModel, read_envelope
from blendserve.dialect.urls import CHAT_URL, COMPLETIONS_URL, RESPONSES_URL
from blendserve.dialect.values import MAX_INT32, shown
from blendserve.errors import RequestError
from blendserve.models.conversation import Conversation, Message
from blendserve.request import SamplingParams

COMPLETIONS_MAX_TOKENS = 16
"""What OpenAI's completions endpoint generates when the body names no limit."""
_LIMIT_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_MEDIA_FIELDS = ("image_url", "input_audio", "file", "video_url", "audio_url")


def parse_remote_line(value: object, line_number: int, served: ServedModel) -> BatchLine:
    """Check a line's envelope. One line is one request, whatever its `n`: the server answers it as a whole.

    Raises: RequestError for a bad envelope, a body that asks for a stream, or one that is no JSON.
    """
    custom_id, url, body = read_envelope(value, ())
    if body.get("stream"):
        raise RequestError(
            f"stream is {shown(body['stream'])}; a batch file is answered by whole responses: remove it",
            code="unsupported_parameter",
            param="stream",
        )
    model = body.get("model")
    return BatchLine(
        line_number=line_number,
        custom_id=custom_id,
        url=url,
        model=model if isinstance(model, str) and model else None,
        prompts=(planning_prompt(body),),
        sampling=_planning_sampling(url, body),
        body=_to_json(body if served.accepts_any_name else {**body, "model": served.name}),
    )


def planning_prompt(body: Mapping[str, Any]) -> Prompt:
    """What the prompt's length and shared prefix are taken from; never empty."""
    if "messages" in body:
        return _conversation(body, body["messages"])
    prompt: Any = body.get("prompt", body.get("input"))
    if prompt is None:  # documents to rank, texts to compare
        prompt = json.dumps({name: value for name, value in body.items() if name != "model"})
    if _is_token_ids(prompt):
        return tuple(prompt)
    parts = prompt if isinstance(prompt, list) else [prompt]
    if any(isinstance(part, dict) for part in parts) or "instructions" in body:
        return _conversation(body, _items(body, parts))
    return "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts) or " "


def _items(body: Mapping[str, Any], parts: list[Any]) -> list[Any]:
    """The input of /v1/responses as messages."""
    given = [part if isinstance(part, dict) else {"role": "user", "content": part} for part in parts]
    items = [part if "role" in part else {"role": "user", "content": json.dumps(part)} for part in given]
    return [{"role": "system", "content": body.get("instructions")}, *items] if body.get("instructions") else items


def _conversation(body: Mapping[str, Any], messages: Any) -> Prompt:
    listed = messages if isinstance(messages, list) else []
    conversation: list[Message] = [
        {"role": str(message.get("role")), "content": "\n".join(_texts(message))}
        for message in listed
        if isinstance(message, dict)
    ]
    if body.get("tools"):  # templates put them in front
        conversation.insert(0, {"role": "system", "content": json.dumps(body["tools"])})
    return Conversation(tuple(conversation)) if conversation else " "


def _texts(message: Mapping[str, Any]) -> Iterable[str]:
    """The words of a message; an image or a sound counts as its digest, so that equal ones share a prefix."""
    content = message.get("content")
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            yield str(part.get("text") or "")
            yield from (blake2b(json.dumps(part[name]).encode()).hexdigest() for name in _MEDIA_FIELDS if name in part)
    if message.get("tool_calls"):
        yield json.dumps(message["tool_calls"])


def _planning_sampling(url: str, body: Mapping[str, Any]) -> SamplingParams:
    """Limits of all choices of the line together, which is what the server's usage will count."""
    if not _generates(url):
        return SamplingParams(max_tokens=1, ignore_eos=True)
    prompt = body.get("prompt")
    num_prompts = len(prompt) if isinstance(prompt, list) and prompt and not _is_token_ids(prompt) else 1
    num_choices = num_prompts * (_count(body.get("n")) or 1)
    limits = (_count(body.get(name)) for name in _LIMIT_FIELDS)
    max_tokens = next(filter(None, limits), COMPLETIONS_MAX_TOKENS if url == COMPLETIONS_URL else None)
    can_stop = body.get("stop") or body.get("stop_token_ids")
    return SamplingParams(
        max_tokens=None if max_tokens is None else min(max_tokens * num_choices, MAX_INT32),
        min_tokens=min((_count(body.get("min_tokens")) or 0) * num_choices, MAX_INT32),
        ignore_eos=body.get("ignore_eos") is True and not can_stop,
    )


def _generates(url: str) -> bool:
    """Does the endpoint write text? Others read their input once, which planning sees as one token of answer."""
    return url in (CHAT_URL, COMPLETIONS_URL, RESPONSES_URL)


def _count(value: object) -> int | None:
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return value if type(value) is int and 0 < value <= MAX_INT32 else None


def _is_token_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(token_id) is int and 0 <= token_id <= MAX_INT32 for token_id in value)
    )


def _to_json(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise RequestError(
            "body holds a number that is too large; write none above 1e308", code="invalid_value", param="body"
        ) from None

"""Streamed answers as server-sent events: pieces of text as they come, and at the end what was not sent yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from blendserve.dialect.rows import key_of
from blendserve.dialect.urls import CHAT_URL, RESPONSES_URL
from blendserve.serve.asking import Asked
from blendserve.serve.response_stream import ResponseStream, event


class Stream(Protocol):
    """The events of one answer. `end` is given the body that the same request gets without streaming."""

    def begin(self) -> list[bytes]: ...
    def piece(self, choice: int, text: str) -> list[bytes]: ...
    def end(self, body: Mapping[str, Any]) -> list[bytes]: ...
    def fail(self, body: Mapping[str, Any]) -> list[bytes]: ...


def stream_of(url: str, asked: Asked, model: str, *, has_usage: bool) -> Stream:
    """The stream of an endpoint's answers. `has_usage`: the last piece of a chat or completion counts tokens."""
    key = key_of(1, asked.id)
    if url == RESPONSES_URL:
        return ResponseStream(key, model, asked.created)
    return ChoiceStream(key, model, asked.created, is_chat=url == CHAT_URL, has_usage=has_usage)


class ChoiceStream:
    """Chunks of a chat or of completions."""

    def __init__(self, key: str, model: str, created: int, *, is_chat: bool, has_usage: bool) -> None:
        self._frame: dict[str, Any] = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{key}",
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": created,
            "model": model,
        }
        self._is_chat = is_chat
        self._has_usage = has_usage
        self._sent: dict[int, str] = {}

    def begin(self) -> list[bytes]:
        return []

    def piece(self, choice: int, text: str) -> list[bytes]:
        is_first = choice not in self._sent
        self._sent[choice] = self._sent.get(choice, "") + text
        if not self._is_chat:
            return [self._chunk({"index": choice, "text": text, "logprobs": None, "finish_reason": None})]
        delta = {"role": "assistant", "content": text} if is_first else {"content": text}
        return [self._chunk({"index": choice, "delta": delta, "logprobs": None, "finish_reason": None})]

    def end(self, body: Mapping[str, Any]) -> list[bytes]:
        self._frame["model"] = body["model"]
        events = [self._chunk(self._rest(choice)) for choice in body["choices"]]
        if self._has_usage:
            events.append(event({**self._frame, "choices": [], "usage": body["usage"]}))
        return [*events, b"data: [DONE]\n\n"]

    def fail(self, body: Mapping[str, Any]) -> list[bytes]:
        return [event(body)]

    def _rest(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """What of a choice was not sent yet, and how it ended."""
        index = int(choice["index"])
        sent = self._sent.get(index, "")
        ending = {"logprobs": choice.get("logprobs"), "finish_reason": choice["finish_reason"]}
        if not self._is_chat:
            return {"index": index, "text": str(choice["text"])[len(sent) :], **ending}
        message = choice["message"]
        delta = {name: value for name, value in message.items() if name not in ("role", "content", "refusal") and value}
        if "tool_calls" in delta:
            delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(delta["tool_calls"])]
        if index not in self._sent:
            delta["role"] = "assistant"
        text = message.get("content") or ""
        if text.startswith(sent) and len(text) > len(sent):
            delta["content"] = text[len(sent) :]
        return {"index": index, "delta": delta, **ending}

    def _chunk(self, choice: Mapping[str, Any]) -> bytes:
        return event({**self._frame, "choices": [choice]})

"""An answer of /v1/responses as a stream: what OpenAI's client reads, each event under its name and number.

The text comes in pieces as the first item. Reasoning and calls are known at the end, and come then, each as one piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(value, ensure_ascii=True).encode() + b"\n\n"


class ResponseStream:
    """The events of one response. `key` is what its ids are made of, here and in the body at the end."""

    def __init__(self, key: str, model: str, created: int) -> None:
        self._opening = {
            "id": f"resp_{key}",
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": model,
            "output": [],
            "parallel_tool_calls": True,
            "temperature": None,
            "tool_choice": "auto",
            "tools": [],
            "top_p": None,
            "usage": None,
        }
        self._text_id = f"msg_{key}"
        self._sent = ""
        self._has_text = False
        self._number = 0

    def begin(self) -> list[bytes]:
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self._opening) for kind in kinds]

    def piece(self, choice: int, text: str) -> list[bytes]:
        del choice  # a response has one
        events = [] if self._has_text else self._begin_text(0, self._text_id)
        self._has_text = True
        self._sent += text
        return [*events, self._text_event("delta", 0, self._text_id, delta=text, logprobs=[])]

    def end(self, body: Mapping[str, Any]) -> list[bytes]:
        events = [one for index, item in enumerate(body["output"]) for one in self._item(index, item)]
        return [*events, self._event(f"response.{body['status']}", response=body)]

    def fail(self, body: Mapping[str, Any]) -> list[bytes]:
        error = body["error"]
        fields = {name: error.get(name) for name in ("code", "message", "param")}
        failed = {**self._opening, "status": "failed"}
        failed["error"] = {"code": "server_error", "message": error["message"]}
        return [self._event("error", **fields), self._event("response.failed", response=failed)]

    def _item(self, index: int, item: Mapping[str, Any]) -> Iterator[bytes]:
        """What of an item was not sent yet."""
        match item["type"]:
            case "message":
                yield from self._end_text(index, item)
            case "reasoning":
                yield from self._reasoning(index, item)
            case "function_call":
                yield from self._call(index, item)
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _begin_text(self, index: int, id: str) -> list[bytes]:
        item = {"id": id, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        part = {"type": "output_text", "text": "", "annotations": []}
        return [
            self._event("response.output_item.added", output_index=index, item=item),
            self._event("response.content_part.added", **_place(index, id), part=part),
        ]

    def _end_text(self, index: int, item: Mapping[str, Any]) -> Iterator[bytes]:
        (part,), id = item["content"], item["id"]
        logprobs = part.get("logprobs") or []
        if not self._has_text:
            yield from self._begin_text(index, id)
        rest = part["text"].removeprefix(self._sent)
        if rest or logprobs:
            yield self._text_event("delta", index, id, delta=rest, logprobs=logprobs)
        yield self._text_event("done", index, id, text=part["text"], logprobs=logprobs)
        yield self._event("response.content_part.done", **_place(index, id), part=part)

    def _reasoning(self, index: int, item: Mapping[str, Any]) -> Iterator[bytes]:
        (part,) = item["content"]
        place = _place(index, item["id"])
        opening = {**item, "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=index, item=opening)
        yield self._event("response.content_part.added", **place, part={**part, "text": ""})
        yield self._event("response.reasoning_text.delta", **place, delta=part["text"])
        yield self._event("response.reasoning_text.done", **place, text=part["text"])
        yield self._event("response.content_part.done", **place, part=part)

    def _call(self, index: int, item: Mapping[str, Any]) -> Iterator[bytes]:
        place = {"item_id": item["id"], "output_index": index}
        opening = {**item, "status": "in_progress", "arguments": ""}
        yield self._event("response.output_item.added", output_index=index, item=opening)
        yield self._event("response.function_call_arguments.delta", **place, delta=item["arguments"])
        yield self._event("response.function_call_arguments.done", **place, arguments=item["arguments"])

    def _text_event(self, kind: str, index: int, id: str, **fields: Any) -> bytes:
        return self._event(f"response.output_text.{kind}", **_place(index, id), **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)


def _place(index: int, id: str) -> dict[str, Any]:
    return {"item_id": id, "output_index": index, "content_index": 0}

"""/v1/chat/completions, /v1/completions, /v1/embeddings and /v1/responses: single requests, streamed or whole."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import httpx2
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from blendserve.engines.http.address import ServerAddress
from blendserve.engines.http.credentials import find_credentials
from blendserve.engines.settings import HttpSettings
from blendserve.serve.asking import Heard
from blendserve.serve.failures import ApiError, invalid
from blendserve.serve.http import json_of, service_of
from blendserve.serve.messages import Piece, Reply
from blendserve.serve.records import ENDPOINTS

_EVENTS = "text/event-stream"
_CHAT = ENDPOINTS[0]


async def answer(request: Request) -> Response:
    """Answer one request ahead of all batches."""
    service, url = service_of(request), request.url.path
    body = await json_of(request)
    name = body.get("model")
    model = service.settings.model_named(name) if isinstance(name, str) or name is None else None
    if model is None:
        raise ApiError(404, f"The model {str(name)[:80]!r} does not exist.", code="model_not_found", param="model")
    if isinstance(model.engine, HttpSettings):
        return await _forwarded(model.engine, url, body)
    is_streamed = body.get("stream", False)
    if not isinstance(is_streamed, bool):
        raise invalid("stream must be true or false.", "stream")
    if is_streamed and url not in ENDPOINTS[:2]:
        raise invalid(f"{url} is not streamed by this engine.", "stream")
    options = body.pop("stream_options", None)
    body.pop("stream", None)
    stack = AsyncExitStack()
    heard = await stack.enter_async_context(service.asking.asked(model, url, body, is_streamed=is_streamed))
    try:
        first = await _unless_gone(request, heard)
    except BaseException:
        await stack.aclose()
        raise
    if isinstance(first, Reply) and (first.status_code != 200 or not is_streamed):
        await stack.aclose()
        return JSONResponse(first.body, first.status_code)
    has_usage = isinstance(options, dict) and options.get("include_usage") is True
    events = _events(stack, heard, first, is_chat=url == _CHAT, has_usage=has_usage)
    return StreamingResponse(events, media_type=_EVENTS, headers={"Cache-Control": "no-store"})


async def _unless_gone(request: Request, heard: Heard) -> Piece | Reply:
    """The first that is heard, unless the client goes away before."""

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)

    hearing, leaving = asyncio.ensure_future(heard.get()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((hearing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not hearing.done():
            raise ApiError(499, "The client went away.", code="timeout")
        return hearing.result()
    finally:
        hearing.cancel()
        leaving.cancel()


async def _events(
    stack: AsyncExitStack, heard: Heard, first: Piece | Reply, *, is_chat: bool, has_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events as OpenAI sends them. Pieces come before the answer that names their id, so this names it."""
    id = os.urandom(16).hex()
    frame: dict[str, Any] = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{id}", "model": None, "created": None}
    frame["object"] = "chat.completion.chunk" if is_chat else "text_completion"
    begun: dict[int, str] = {}
    report: Piece | Reply = first
    async with stack:
        while isinstance(report, Piece):
            yield _piece_event(frame, report.choice, report.text, begun, is_chat=is_chat)
            report = await heard.get()
        if report.status_code != 200:
            yield _event(report.body)
            return
        body = report.body
        frame |= {"model": body["model"], "created": body["created"]}
        for choice in body["choices"]:
            for event in _last_events(frame, choice, begun, is_chat=is_chat):
                yield event
        if has_usage:
            yield _event({**frame, "choices": [], "usage": body["usage"]})
        yield b"data: [DONE]\n\n"


def _piece_event(frame: Mapping[str, Any], index: int, text: str, begun: dict[int, str], *, is_chat: bool) -> bytes:
    is_first = index not in begun
    begun[index] = begun.get(index, "") + text
    if not is_chat:
        return _chunk(frame, {"index": index, "text": text, "logprobs": None, "finish_reason": None})
    delta = {"role": "assistant", "content": text} if is_first else {"content": text}
    return _chunk(frame, {"index": index, "delta": delta, "logprobs": None, "finish_reason": None})


def _last_events(
    frame: Mapping[str, Any], choice: Mapping[str, Any], begun: dict[int, str], *, is_chat: bool
) -> list[bytes]:
    """What of a choice was not sent yet, and how it ended."""
    index, sent = int(choice["index"]), begun.get(int(choice["index"]), "")
    ending = {"logprobs": choice.get("logprobs"), "finish_reason": choice["finish_reason"]}
    if not is_chat:
        text = str(choice["text"])
        return [_chunk(frame, {"index": index, "text": text[len(sent) :], **ending})]
    message = choice["message"]
    delta = {name: value for name, value in message.items() if name not in ("role", "content", "refusal") and value}
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(delta["tool_calls"])]
    if index not in begun:
        delta["role"] = "assistant"
    text = message.get("content") or ""
    if text.startswith(sent) and len(text) > len(sent):
        delta["content"] = text[len(sent) :]
    return [_chunk(frame, {"index": index, "delta": delta, **ending})]


def _chunk(frame: Mapping[str, Any], choice: Mapping[str, Any]) -> bytes:
    return _event({**frame, "choices": [choice]})


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=True).encode() + b"\n\n"


async def _forwarded(settings: HttpSettings, url: str, body: dict[str, Any]) -> Response:
    """The answer of the server that the engine asks too, as it comes."""
    address = ServerAddress.parse(settings.base_url)
    credentials = find_credentials(os.environ, address, settings.headers)
    if settings.model is not None:
        body["model"] = settings.model
    stack = AsyncExitStack()
    client = await stack.enter_async_context(httpx2.AsyncClient(timeout=settings.request_timeout_s))
    try:
        sending = client.stream("POST", address.url_of(url), json=body, headers=credentials.sent)
        reply = await stack.enter_async_context(sending)
    except httpx2.TransportError as error:
        await stack.aclose()
        raise ApiError(
            502, f"The server behind this service does not answer ({type(error).__name__}).", code="engine_failed"
        ) from error

    async def chunks() -> AsyncIterator[bytes]:
        async with stack:
            async for chunk in reply.aiter_bytes():
                yield chunk

    return StreamingResponse(chunks(), reply.status_code, media_type=reply.headers.get("content-type"))


ROUTES = [Route(url, answer, methods=["POST"]) for url in ENDPOINTS]

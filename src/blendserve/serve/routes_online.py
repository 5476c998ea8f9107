"""/v1/chat/completions, /v1/completions, /v1/embeddings and /v1/responses: single requests, streamed or whole."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx2
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from blendserve.dialect.urls import EMBEDDINGS_URL
from blendserve.engines.http.address import ServerAddress
from blendserve.engines.http.credentials import find_credentials
from blendserve.engines.settings import HttpSettings, ReplicaSettings
from blendserve.serve.asking import Heard
from blendserve.serve.failures import ApiError, invalid
from blendserve.serve.http import json_of, service_of
from blendserve.serve.messages import Piece, Reply
from blendserve.serve.records import ENDPOINTS
from blendserve.serve.streams import Stream, stream_of

_EVENTS = "text/event-stream"


async def answer(request: Request) -> Response:
    """Answer one request ahead of all batches."""
    service, url = service_of(request), request.url.path
    body = await json_of(request)
    name = body.get("model")
    model = service.settings.model_named(name) if isinstance(name, str) or name is None else None
    if model is None:
        raise ApiError(404, f"The model {str(name)[:80]!r} does not exist.", code="model_not_found", param="model")
    engine = model.engine.engine if isinstance(model.engine, ReplicaSettings) else model.engine
    if isinstance(engine, HttpSettings):
        return await _forwarded(engine, url, body)
    is_streamed = body.get("stream", False)
    if not isinstance(is_streamed, bool):
        raise invalid("stream must be true or false.", "stream")
    if is_streamed and url == EMBEDDINGS_URL:
        raise invalid("Embeddings are not streamed; leave stream out.", "stream")
    options = body.pop("stream_options", None)
    body.pop("stream", None)
    stack = AsyncExitStack()
    asked = await stack.enter_async_context(service.asking.asked(model, url, body, is_streamed=is_streamed))
    try:
        first = await _unless_gone(request, asked.heard)
    except BaseException:
        await stack.aclose()
        raise
    if isinstance(first, Reply) and (first.status_code != 200 or not is_streamed):
        await stack.aclose()
        return JSONResponse(first.body, first.status_code)
    has_usage = isinstance(options, dict) and options.get("include_usage") is True
    stream = stream_of(url, asked, model.name, has_usage=has_usage)
    events = _events(stack, asked.heard, first, stream)
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


async def _events(stack: AsyncExitStack, heard: Heard, first: Piece | Reply, stream: Stream) -> AsyncIterator[bytes]:
    report: Piece | Reply = first
    async with stack:
        for event in stream.begin():
            yield event
        while isinstance(report, Piece):
            for event in stream.piece(report.choice, report.text):
                yield event
            report = await heard.get()
        for event in stream.end(report.body) if report.status_code == 200 else stream.fail(report.body):
            yield event


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

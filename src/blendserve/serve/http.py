"""What all routes share: bodies with limits, callers, pages of lists, and errors in OpenAI's shape."""

from __future__ import annotations

import json
import logging
import random
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from html import escape
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from blendserve.errors import BlendServeError, CapacityError
from blendserve.serve.caller import Caller
from blendserve.serve.failures import ApiError, invalid
from blendserve.serve.multipart import watched
from blendserve.serve.service import Service

_log = logging.getLogger("blendserve.serve")


class HasId(Protocol):
    @property
    def id(self) -> str: ...
    def to_json(self) -> dict[str, Any]: ...


def service_of(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


def caller_of(request: Request) -> Caller:
    """Whom the guard has let in."""
    found: Caller = request.scope["caller"]
    return found


def body_of(request: Request) -> AsyncIterator[bytes]:
    """The chunks of a body, with a limit on silence."""
    return watched(aiter(request.stream()), service_of(request).settings.limits.stall_s)


def announced_bytes(request: Request) -> int | None:
    text = request.headers.get("content-length", "")
    return int(text) if text.isdecimal() and len(text) < 19 else None


async def json_of(request: Request, *, is_optional: bool = False) -> dict[str, Any]:
    """The JSON object of a body. Raises: ApiError."""
    limit = service_of(request).settings.limits.max_body_bytes
    data = bytearray()
    async for chunk in body_of(request):
        data += chunk
        if len(data) > limit:
            raise ApiError(413, f"The body has more than {limit} bytes.", code="body_too_large")
    if is_optional and not data.strip():
        return {}
    try:
        value = json.loads(data, parse_constant=_reject)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be stored
    except (ValueError, RecursionError):
        raise invalid("The body is not valid JSON.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("The body must be a JSON object.", code="invalid_json")
    return value


def _reject(text: str) -> None:
    raise ValueError(text)


def limit_of(request: Request, default: int, most: int) -> int:
    text = request.query_params.get("limit", str(default))
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= most:
        raise invalid(f"limit must be a whole number from 1 to {most}.", "limit")
    return int(text)


def page_of(records: Sequence[HasId], limit: int) -> dict[str, Any]:
    """OpenAI's list, of one record more than the limit if there are more."""
    shown = records[:limit]
    return {
        "object": "list",
        "data": [record.to_json() for record in shown],
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": len(records) > limit,
    }


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.to_json(), error.status_code, headers=error.headers)


def _response_to(request: Request, error: ApiError) -> Response:
    """JSON for programs; for people with a browser a page that leads back."""
    is_page = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/v1/")
    if not is_page:
        return error_response(error)
    text = (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Error - BlendServe</title>'
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="/static/page.css">'
        '<link rel="stylesheet" href="/static/serve.css">'
        f'<main><h1>That did not work</h1><p class="problem" role="alert">{escape(error.message)}</p>'
        '<p><a class="button" href="/">All batches</a> <a class="button" href="/files">Files</a></p></main></html>'
    )
    return HTMLResponse(text, error.status_code, headers=error.headers)


def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response_to(request, error)


def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    message = {
        404: f"Unknown request URL: {request.method} {path}.",
        405: f"{request.method} is not allowed for {path}.",
    }.get(error.status_code, error.detail)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    return _response_to(request, ApiError(error.status_code, message, code=code, headers=error.headers))


def _on_full(_: Request, error: Exception) -> Response:
    return error_response(ApiError(507, f"{error}.", code="no_space"))


def _on_our_error(_: Request, error: Exception) -> Response:
    _log.error("%s", error)
    return error_response(ApiError(500, f"{error}.", code="server_error"))


def _on_store_error(_: Request, error: Exception) -> Response:
    _log.error("the store failed: %s", error)
    is_full = "full" in str(error)
    message = "The service cannot read or write its database; see its log."
    return error_response(ApiError(507 if is_full else 500, message, code="no_space" if is_full else "server_error"))


def _on_os_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    _log.error("%s", error)
    return error_response(ApiError(500, f"The service cannot use its disk: {error.strerror}.", code="server_error"))


def _on_disconnect(_: Request, error: Exception) -> Response:  # noqa: ARG001
    return Response(status_code=499)


def _on_bug(_: Request, error: Exception) -> Response:
    _log.error("unexpected %s", type(error).__name__)
    return error_response(ApiError(500, "The service failed on this request; see its log.", code="server_error"))


HANDLERS: Mapping[Any, Any] = {
    ApiError: _on_api_error,
    HTTPException: _on_http_error,
    CapacityError: _on_full,
    BlendServeError: _on_our_error,
    sqlite3.Error: _on_store_error,
    OSError: _on_os_error,
    ClientDisconnect: _on_disconnect,
    Exception: _on_bug,
}


def request_id() -> str:
    return f"req_{random.getrandbits(128):032x}"

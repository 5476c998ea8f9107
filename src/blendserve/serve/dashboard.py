"""The dashboard: pages made here, that work without JavaScript, and are renewed by server-sent events with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader, select_autoescape
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from blendserve.job.record_log import ERROR_KINDS, OUTPUT_KINDS
from blendserve.report.format import format_bytes, format_count, format_duration, format_share
from blendserve.serve.admission import ACTIVE
from blendserve.serve.failures import ApiError
from blendserve.serve.finalize import partial_rows
from blendserve.serve.guard import COOKIE, Sessions, cookie_of
from blendserve.serve.http import announced_bytes, body_of, caller_of, service_of
from blendserve.serve.pairs import PAGE_LINES, count_codes, read_pairs
from blendserve.serve.records import ENDPOINTS, BatchRecord, FileRecord
from blendserve.serve.service import Service
from blendserve.serve.states import can_cancel

PAGE_ROWS = 50
_MAX_FORM_BYTES = 16 << 10
_KEEP_ALIVE_S = 15.0
_PACE_S = 1.0
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "same-origin", "Cache-Control": "no-store"}
_PAGES = Environment(
    loader=PackageLoader("blendserve.serve"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
)
_STATIC = {
    "page.css": ("blendserve.report", "page.css"),
    **{
        name: ("blendserve.serve", f"static/{name}")
        for name in ("serve.css", "serve.js", "htmx.min.js", "htmx-sse.min.js")
    },
}


def _page(name: str, here: str, title: str, status_code: int = 200, **values: Any) -> Response:
    text = _PAGES.get_template(name).render(here=here, title=title, **values)
    return HTMLResponse(text, status_code, headers=_HEADERS)


async def show_batches(request: Request) -> Response:
    service, caller = service_of(request), caller_of(request)
    after = request.query_params.get("after")
    found = service.batches.page(caller, after=after, limit=PAGE_ROWS + 1)
    ends = service.scheduler.forecast.ends()
    return _page(
        "batches.html",
        "/",
        "Batches",
        url=f"/?after={after}" if after else "/",
        tiles=_engine_tiles(service, caller.owner),
        trouble=service.scheduler.trouble,
        rows=[_batch_row(service, batch, ends) for batch in found[:PAGE_ROWS]],
        next=found[PAGE_ROWS - 1].id if len(found) > PAGE_ROWS else None,
        base_url=str(request.base_url) + "v1",
    )


async def show_batch(request: Request) -> Response:
    service, caller = service_of(request), caller_of(request)
    batch = service.batches.get(caller, request.path_params["id"])
    text = request.query_params.get("from", "0")
    first = min(int(text), 1 << 40) if text.isascii() and text.isdecimal() and len(text) < 12 else 0
    picture = service.scheduler.picture_of(batch)
    pairs, codes, no_pairs = await asyncio.to_thread(_read_rows, service, batch, first)
    return _page(
        "batch.html",
        "",
        f"Batch {batch.id}",
        url=f"/batch/{batch.id}?from={first}",
        row=_batch_row(service, batch, service.scheduler.forecast.ends()),
        metadata=batch.metadata or {},
        is_ended=batch.is_ended,
        can_cancel=can_cancel(batch.status),
        tiles=_batch_tiles(service, batch),
        errors=batch.errors,
        downloads=list(_downloads(batch)),
        codes=codes,
        picture=picture and _shown_picture(picture),
        pairs=pairs,
        no_pairs=no_pairs,
        previous=max(0, first - PAGE_LINES) if first else None,
        following=first + PAGE_LINES if len(pairs) == PAGE_LINES else None,
    )


async def show_files(request: Request) -> Response:
    service, caller = service_of(request), caller_of(request)
    after, new = request.query_params.get("after"), request.query_params.get("new")
    if after is not None:
        service.library.file(caller, after)
    found = service.store.page(FileRecord, owner=caller.owner, after=after, limit=PAGE_ROWS + 1)
    return _page(
        "files.html",
        "/files",
        "Files",
        endpoints=ENDPOINTS,
        rows=[_file_row(file, new) for file in found[:PAGE_ROWS]],
        next=found[PAGE_ROWS - 1].id if len(found) > PAGE_ROWS else None,
    )


async def show_keys(request: Request) -> Response:
    service, key = service_of(request), caller_of(request).key
    used = service.store.stored_bytes(key.id) if key else 0
    limit = "no limit" if key is None or key.max_bytes is None else f"of {format_bytes(key.max_bytes)}"
    tiles = [("this key", key.name, f"{key.hint}..."), ("stored", format_bytes(used), limit)] if key else []
    return _page("keys.html", "/keys", "Keys", key=key, tiles=tiles, data=service.settings.data)


async def show_login(_: Request) -> Response:
    return _page("login.html", "/login", "Log in", is_login=True)


async def log_in(request: Request) -> Response:
    service, form = service_of(request), await _form_of(request)
    key = service.keys.find(form.get("key", "").strip())
    if key is None:
        problem = "The service knows no such key."
        return _page("login.html", "/login", "Log in", 401, is_login=True, problem=problem)
    sessions: Sessions = request.app.state.sessions
    response = RedirectResponse("/", 303)
    is_secure = service.settings.certificate is not None
    response.set_cookie(COOKIE, sessions.begin(key), httponly=True, samesite="strict", secure=is_secure, path="/")
    return response


async def log_out(request: Request) -> Response:
    sessions: Sessions = request.app.state.sessions
    name = cookie_of(request.headers)
    if name is not None:
        sessions.end(name)
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE)
    return response


async def take_file(request: Request) -> Response:
    library, caller = service_of(request).library, caller_of(request)
    library.check_announced(caller, announced_bytes(request))
    record = await library.receive(caller, body_of(request), request.headers.get("content-type"))
    return RedirectResponse(f"/files?new={record.id}", 303)


async def take_batch(request: Request) -> Response:
    form = await _form_of(request)
    batch = service_of(request).batches.create(caller_of(request), form)
    return RedirectResponse(f"/batch/{batch.id}", 303)


async def cancel_batch(request: Request) -> Response:
    id = request.path_params["id"]
    service_of(request).batches.cancel(caller_of(request), id)
    return RedirectResponse(f"/batch/{id}", 303)


async def delete_batch(request: Request) -> Response:
    service_of(request).batches.delete(caller_of(request), request.path_params["id"])
    return RedirectResponse("/", 303)


async def delete_file(request: Request) -> Response:
    service_of(request).library.delete(caller_of(request), request.path_params["id"])
    return RedirectResponse("/files", 303)


async def send_events(request: Request) -> Response:
    """Tells that something has changed, at most once a second; pages then ask for what they show.

    Also at once: something may have changed since the page was made. No change is the last one and not told.
    """
    service = service_of(request)
    event = asyncio.Event()
    event.set()

    async def events() -> AsyncIterator[bytes]:
        service.watchers.add(event)
        try:
            while True:
                try:
                    await asyncio.wait_for(event.wait(), _KEEP_ALIVE_S)
                    event.clear()
                    yield b"event: changed\ndata: .\n\n"
                    await asyncio.sleep(_PACE_S)
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            service.watchers.discard(event)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def send_static(request: Request) -> Response:
    package, name = _STATIC.get(request.path_params["name"], ("", ""))
    if not package:
        raise ApiError(404, "There is no such file.", code="unknown_url")
    return FileResponse(str(files(package) / name), headers={"Cache-Control": "max-age=3600"})


async def _form_of(request: Request) -> dict[str, str]:
    """Fields of a small form. Raises: ApiError."""
    data = bytearray()
    async for chunk in body_of(request):
        data += chunk
        if len(data) > _MAX_FORM_BYTES:
            raise ApiError(413, "The form is too large.", code="body_too_large")
    try:
        return {name: values[-1] for name, values in parse_qs(data.decode(), max_num_fields=50).items()}
    except ValueError:
        raise ApiError(400, "The form cannot be read.", code="invalid_form") from None


# What pages show


def _batch_row(service: Service, batch: BatchRecord, ends: Mapping[str, float]) -> dict[str, Any]:
    done, failed, total = batch.num_completed, batch.num_failed, max(1, batch.num_lines)
    counts = done + failed, batch.num_lines, failed
    end = ends.get(batch.id)
    return {
        "id": batch.id,
        "short": batch.id[:14],
        "status": batch.status,
        "model": batch.model,
        "counts": "{} of {} done, {} failed".format(*map(format_count, counts)),
        "done_share": 100 * done / total,
        "bad_share": 100 * failed / total,
        "created": _when(batch.created_at),
        "deadline": "" if batch.is_ended else _when(batch.expires_at),
        "expected_end": "" if end is None else f"in {format_duration(max(0.0, end - service.clock()))}",
        "is_in_danger": end is not None and end > batch.expires_at,
    }


def _file_row(file: FileRecord, new: str | None) -> dict[str, Any]:
    return {
        "id": file.id,
        "short": file.id[:13],
        "filename": file.filename,
        "purpose": file.purpose,
        "size": format_bytes(file.num_bytes) if file.num_bytes >= 1000 else f"{file.num_bytes} bytes",
        "num_lines": format_count(file.num_lines),
        "created": _when(file.created_at),
        "expires": "" if file.expires_at is None else _when(file.expires_at),
        "is_new": file.id == new,
    }


def _engine_tiles(service: Service, owner: str) -> list[tuple[str, str, str]]:
    scheduler = service.scheduler
    model = scheduler.host.model
    state = "ready" if scheduler.is_ready else "starting" if scheduler.host.is_running else "stopped"
    active = [batch for label in ACTIVE for batch in service.store.page(BatchRecord, owner=owner, label=label)]
    now = scheduler.engine_state if scheduler.running_ids else None
    tiles = [
        ("engine", state, model.name if model else ""),
        ("your batches under way", format_count(len(active)), f"{len(scheduler.running_ids)} run together now"),
        ("speed", f"{format_count(round(scheduler.tally.token_rate))}/s", "tokens of this round, prompts and answers"),
    ]
    if now is not None:
        tiles.append(("running requests", format_count(now.num_running), "at this moment"))
        if now.kv_use is not None:
            tiles.append(("KV memory", format_share(now.kv_use), "in use"))
        if now.prefix_hit_rate is not None:
            tiles.append(("prefix hits", format_share(now.prefix_hit_rate), "of prompt tokens not computed again"))
    return tiles


def _batch_tiles(service: Service, batch: BatchRecord) -> list[tuple[str, str, str]]:
    begun, now = batch.times.get("in_progress_at"), service.clock()
    over = max((at for name, at in batch.times.items() if name != "in_progress_at"), default=int(now))
    tiles = [
        ("created", _when(batch.created_at), batch.endpoint),
        ("window", batch.completion_window, f"until {_when(batch.expires_at)}"),
    ]
    if begun is not None:
        spent = max(0.0, (over if batch.is_ended else now) - begun)
        tiles.append(("time", format_duration(max(spent, 1e-3)), "since it was taken up"))
    if batch.usage:
        for name, label in (("input_tokens", "tokens in"), ("output_tokens", "tokens out")):
            tiles.append((label, format_count(batch.usage[name]), "of all answers"))
    if batch.id in service.scheduler.running_ids:
        tiles.append(("speed", f"{format_count(round(service.scheduler.tally.token_rate))}/s", "tokens of its round"))
    end = service.scheduler.forecast.ends().get(batch.id)
    if end is not None:
        tiles.append(("expected end", f"in {format_duration(max(1e-3, end - now))}", "by the forecast"))
    return tiles


def _downloads(batch: BatchRecord) -> Iterator[tuple[str, str]]:
    yield "Input", f"/v1/files/{batch.input_file_id}/content"
    if not batch.is_ended:
        yield "Answers so far", f"/v1/batches/{batch.id}/output"
        yield "Errors so far", f"/v1/batches/{batch.id}/errors"
    if batch.output_file_id:
        yield "Answers", f"/v1/files/{batch.output_file_id}/content"
    if batch.error_file_id:
        yield "Errors", f"/v1/files/{batch.error_file_id}/content"


def _read_rows(service: Service, batch: BatchRecord, first: int) -> tuple[list[Any], list[tuple[str, int]], str]:
    """Pairs from a line on, errors by code, and what to say where there are no pairs."""
    codes = count_codes(_rows_of(service, batch, is_output=False))
    rows = (row for is_output in (True, False) for row in _rows_of(service, batch, is_output=is_output))
    try:
        missing = "No answer." if batch.is_ended else "No answer yet."
        pairs = read_pairs(service.blobs.path(batch.input_file_id), rows, first, missing)
    except FileNotFoundError:
        return [], codes, "The input file was deleted."
    return pairs, codes, "There are no more lines."


def _rows_of(service: Service, batch: BatchRecord, *, is_output: bool) -> Iterator[bytes]:
    if not batch.is_ended:
        yield from partial_rows(service.batches.directory(batch.id), OUTPUT_KINDS if is_output else ERROR_KINDS)
        return
    id = batch.output_file_id if is_output else batch.error_file_id
    if id is not None and service.blobs.path(id).is_file():
        with service.blobs.open(id) as file:
            yield from file


def _shown_picture(picture: Any) -> dict[str, Any]:
    shared = 1 - picture.num_unique_tokens / max(1, picture.num_prompt_tokens)
    return {
        "num_requests": format_count(picture.num_requests),
        "sharing": format_share(shared),
        "density": picture.density,
        "icicle": picture.icicle,
    }


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


ROUTES = [
    Route("/", show_batches, methods=["GET"]),
    Route("/batch/{id}", show_batch, methods=["GET"]),
    Route("/batch/{id}/cancel", cancel_batch, methods=["POST"]),
    Route("/batch/{id}/delete", delete_batch, methods=["POST"]),
    Route("/batches", take_batch, methods=["POST"]),
    Route("/files", show_files, methods=["GET"]),
    Route("/files", take_file, methods=["POST"]),
    Route("/file/{id}/delete", delete_file, methods=["POST"]),
    Route("/keys", show_keys, methods=["GET"]),
    Route("/login", show_login, methods=["GET"]),
    Route("/login", log_in, methods=["POST"]),
    Route("/logout", log_out, methods=["POST"]),
    Route("/events", send_events, methods=["GET"]),
    Route("/static/{name}", send_static, methods=["GET"]),
]

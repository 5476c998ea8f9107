"""/v1/files and /v1/uploads."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from blendserve.job.record_log import ERROR_KINDS, OUTPUT_KINDS
from blendserve.serve.failures import invalid, not_found
from blendserve.serve.finalize import partial_rows
from blendserve.serve.http import announced_bytes, body_of, caller_of, json_of, limit_of, page_of, service_of
from blendserve.serve.records import BatchRecord, FileRecord

JSON_LINES = "application/jsonl"
_CHUNK_BYTES = 256 << 10


async def create_file(request: Request) -> Response:
    library, caller = service_of(request).library, caller_of(request)
    library.check_announced(caller, announced_bytes(request))
    record = await library.receive(caller, body_of(request), request.headers.get("content-type"))
    return JSONResponse(record.to_json())


async def list_files(request: Request) -> Response:
    service, caller = service_of(request), caller_of(request)
    limit, query = limit_of(request, 10_000, 10_000), request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("order must be asc or desc.", "order")
    after = query.get("after")
    if after is not None:
        service.library.file(caller, after)
    found = service.store.page(
        FileRecord,
        owner=caller.owner,
        label=query.get("purpose"),
        after=after,
        limit=limit + 1,
        is_newest_first=order == "desc",
    )
    return JSONResponse(page_of(found, limit))


async def get_file(request: Request) -> Response:
    return JSONResponse(service_of(request).library.file(caller_of(request), request.path_params["id"]).to_json())


async def delete_file(request: Request) -> Response:
    id = request.path_params["id"]
    service_of(request).library.delete(caller_of(request), id)
    return JSONResponse({"id": id, "object": "file", "deleted": True})


async def get_content(request: Request) -> Response:
    """A whole file, or a range of it; the rows so far of a file that a running batch writes."""
    service, caller, id = service_of(request), caller_of(request), request.path_params["id"]
    batch = next((batch for batch in _active(request) if id in (batch.output_id, batch.errors_id)), None)
    if batch is not None:
        return partial_response(request, batch, is_output=id == batch.output_id)
    record = service.library.file(caller, id)
    path = service.blobs.path(record.id)
    if not path.is_file():
        raise not_found("File object", id)
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(record.filename, safe='')}"}
    return FileResponse(path, media_type=JSON_LINES, headers=headers)


def partial_response(request: Request, batch: BatchRecord, *, is_output: bool) -> Response:
    """Rows that a running batch has by now, in the order in which they were made."""
    directory = service_of(request).batches.directory(batch.id)
    rows = partial_rows(directory, OUTPUT_KINDS if is_output else ERROR_KINDS)
    return StreamingResponse(_in_chunks(rows), media_type=JSON_LINES, headers={"X-Incomplete": "true"})


def _active(request: Request) -> list[BatchRecord]:
    store, owner = service_of(request).store, caller_of(request).owner
    labels = ("in_progress", "finalizing", "cancelling")
    return [batch for label in labels for batch in store.page(BatchRecord, owner=owner, label=label)]


def _in_chunks(rows: Iterator[bytes]) -> Iterator[bytes]:
    chunk = bytearray()
    for row in rows:
        chunk += row
        if len(chunk) >= _CHUNK_BYTES:
            yield bytes(chunk)
            chunk.clear()
    yield bytes(chunk)


async def create_upload(request: Request) -> Response:
    body = await json_of(request)
    return JSONResponse(service_of(request).library.create_upload(caller_of(request), body).to_json())


async def add_part(request: Request) -> Response:
    library, caller = service_of(request).library, caller_of(request)
    library.check_announced(caller, announced_bytes(request))
    content_type = request.headers.get("content-type")
    return JSONResponse(await library.add_part(caller, request.path_params["id"], body_of(request), content_type))


async def complete_upload(request: Request) -> Response:
    body = await json_of(request)
    library, caller = service_of(request).library, caller_of(request)
    upload, file = await library.complete_upload(caller, request.path_params["id"], body)
    return JSONResponse(upload.to_json(file))


async def cancel_upload(request: Request) -> Response:
    library = service_of(request).library
    return JSONResponse(library.cancel_upload(caller_of(request), request.path_params["id"]).to_json())


ROUTES = [
    Route("/v1/files", create_file, methods=["POST"]),
    Route("/v1/files", list_files, methods=["GET"]),
    Route("/v1/files/{id}", get_file, methods=["GET"]),
    Route("/v1/files/{id}", delete_file, methods=["DELETE"]),
    Route("/v1/files/{id}/content", get_content, methods=["GET"]),
    Route("/v1/uploads", create_upload, methods=["POST"]),
    Route("/v1/uploads/{id}/parts", add_part, methods=["POST"]),
    Route("/v1/uploads/{id}/complete", complete_upload, methods=["POST"]),
    Route("/v1/uploads/{id}/cancel", cancel_upload, methods=["POST"]),
]

"""/v1/batches, and what a batch has by now."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from blendserve.serve.failures import invalid, not_found
from blendserve.serve.http import caller_of, json_of, limit_of, page_of, service_of
from blendserve.serve.routes_files import partial_response

_MAX_KEY = 256


async def create_batch(request: Request) -> Response:
    body = await json_of(request)
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= _MAX_KEY:
        raise invalid(f"Idempotency-Key must have 1 to {_MAX_KEY} characters.", "Idempotency-Key")
    batch = service_of(request).batches.create(caller_of(request), body, key)
    return JSONResponse(batch.to_json())


async def list_batches(request: Request) -> Response:
    limit = limit_of(request, 20, 100)
    after = request.query_params.get("after")
    found = service_of(request).batches.page(caller_of(request), after=after, limit=limit + 1)
    return JSONResponse(page_of(found, limit))


async def get_batch(request: Request) -> Response:
    service, caller, id = service_of(request), caller_of(request), request.path_params["id"]
    batch = service.batches.find(caller, id)
    if batch is None:
        raise not_found("Batch", id)
    return Response(service.poll_bodies.body(batch), media_type="application/json")


async def cancel_batch(request: Request) -> Response:
    return JSONResponse(service_of(request).batches.cancel(caller_of(request), request.path_params["id"]).to_json())


async def delete_batch(request: Request) -> Response:
    id = request.path_params["id"]
    service_of(request).batches.delete(caller_of(request), id)
    return JSONResponse({"id": id, "object": "batch", "deleted": True})


async def get_output(request: Request) -> Response:
    return _rows(request, is_output=True)


async def get_errors(request: Request) -> Response:
    return _rows(request, is_output=False)


def _rows(request: Request, *, is_output: bool) -> Response:
    """The rows so far, or the file once it stands."""
    batch = service_of(request).batches.get(caller_of(request), request.path_params["id"])
    if not batch.is_ended:
        return partial_response(request, batch, is_output=is_output)
    id = batch.output_file_id if is_output else batch.error_file_id
    if id is None:
        raise not_found("output file of batch" if is_output else "error file of batch", batch.id)
    return RedirectResponse(f"/v1/files/{id}/content", 307)


ROUTES = [
    Route("/v1/batches", create_batch, methods=["POST"]),
    Route("/v1/batches", list_batches, methods=["GET"]),
    Route("/v1/batches/{id}", get_batch, methods=["GET"]),
    Route("/v1/batches/{id}", delete_batch, methods=["DELETE"]),
    Route("/v1/batches/{id}/cancel", cancel_batch, methods=["POST"]),
    Route("/v1/batches/{id}/output", get_output, methods=["GET"]),
    Route("/v1/batches/{id}/errors", get_errors, methods=["GET"]),
]

"""The OpenAPI document of the service, at /openapi.json: what a client may send, and the shapes of what comes back."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from blendserve.serve.records import ENDPOINTS

_JSON = "application/json"
_TEXT: dict[str, Any] = {"type": "string"}
_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"}}
_AFTER = {"name": "after", "in": "query", "schema": _TEXT}
_LIFETIME = {
    "type": "object",
    "required": ["anchor", "seconds"],
    "properties": {
        "anchor": {"enum": ["created_at"]},
        "seconds": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}
_METADATA = {
    "type": "object",
    "nullable": True,
    "maxProperties": 16,
    "additionalProperties": {"type": "string", "maxLength": 512},
}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


_SCHEMAS: dict[str, Any] = {
    "Error": _object(
        ["error"],
        error=_object(
            ["message", "type", "param", "code"],
            message=_TEXT,
            type=_TEXT,
            param={**_TEXT, "nullable": True},
            code={**_TEXT, "nullable": True},
        ),
    ),
    "File": _object(
        ["id", "object", "bytes", "created_at", "filename", "purpose", "status"],
        id=_TEXT,
        object={"enum": ["file"]},
        bytes={"type": "integer"},
        created_at={"type": "integer"},
        expires_at={"type": "integer", "nullable": True},
        filename=_TEXT,
        purpose={"enum": ["batch", "batch_output"]},
        status={"enum": ["processed"]},
    ),
    "Upload": _object(["id", "object", "status"], id=_TEXT, object={"enum": ["upload"]}, status=_TEXT),
    "Batch": _object(
        ["id", "object", "endpoint", "status", "input_file_id", "completion_window", "created_at", "request_counts"],
        id=_TEXT,
        object={"enum": ["batch"]},
        endpoint=_TEXT,
        status=_TEXT,
        input_file_id=_TEXT,
        completion_window=_TEXT,
        created_at={"type": "integer"},
        request_counts={"type": "object"},
    ),
    "NewUpload": _object(
        ["bytes", "filename", "mime_type", "purpose"],
        bytes={"type": "integer", "minimum": 1},
        filename=_TEXT,
        mime_type=_TEXT,
        purpose={"enum": ["batch"]},
        expires_after=_LIFETIME,
    ),
    "Parts": _object(["part_ids"], part_ids={"type": "array", "items": _TEXT}, md5=_TEXT),
    "NewBatch": _object(
        ["input_file_id", "endpoint", "completion_window"],
        input_file_id=_TEXT,
        endpoint={"enum": list(ENDPOINTS)},
        completion_window={"type": "string", "pattern": "^[1-9][0-9]{0,2}[mhd]$"},
        metadata=_METADATA,
        output_expires_after=_LIFETIME,
    ),
    "Request": _object(["model"], model=_TEXT, stream={"type": "boolean"}),
}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _list_of(name: str) -> dict[str, Any]:
    return _object(["object", "data"], object={"enum": ["list"]}, data={"type": "array", "items": _ref(name)})


def _operation(
    summary: str,
    answer: Any = None,
    *,
    body: Any = None,
    body_type: str = _JSON,
    parameters: list[Any] | None = None,
    answer_type: str = _JSON,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "done", "content": {answer_type: {"schema": answer or {}}}},
            "default": {"description": "an error", "content": {_JSON: {"schema": _ref("Error")}}},
        },
    }
    if parameters:
        found["parameters"] = parameters
    if body is not None:
        found["requestBody"] = {"required": True, "content": {body_type: {"schema": body}}}
    return found


def _form(file_field: str, **fields: Any) -> dict[str, Any]:
    return _object([file_field, *fields], **{file_field: {"type": "string", "format": "binary"}}, **fields)


def _limit(most: int) -> dict[str, Any]:
    return {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": most}}


def document() -> dict[str, Any]:
    """The whole document."""
    multipart, lines = "multipart/form-data", "application/jsonl"
    deleted = _object(["id", "deleted"], id=_TEXT, deleted={"type": "boolean"})
    order = {"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}}
    purpose = {"name": "purpose", "in": "query", "schema": _TEXT}
    key = {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "pattern": "^[A-Za-z0-9-]{1,64}$"}}
    new_file = _form("file", purpose={"enum": ["batch"]})
    paths: dict[str, Any] = {
        "/v1/files": {
            "post": _operation("Store a batch file", _ref("File"), body=new_file, body_type=multipart),
            "get": _operation("List files", _list_of("File"), parameters=[_AFTER, _limit(10_000), order, purpose]),
        },
        "/v1/files/{id}": {
            "get": _operation("One file", _ref("File"), parameters=[_ID]),
            "delete": _operation("Delete a file", deleted, parameters=[_ID]),
        },
        "/v1/files/{id}/content": {
            "get": _operation("The bytes of a file", _TEXT, parameters=[_ID], answer_type=lines)
        },
        "/v1/uploads": {"post": _operation("Begin an upload", _ref("Upload"), body=_ref("NewUpload"))},
        "/v1/uploads/{id}/parts": {
            "post": _operation("Send a part", body=_form("data"), body_type=multipart, parameters=[_ID])
        },
        "/v1/uploads/{id}/complete": {
            "post": _operation("Join the parts", _ref("Upload"), body=_ref("Parts"), parameters=[_ID])
        },
        "/v1/uploads/{id}/cancel": {"post": _operation("Cancel an upload", _ref("Upload"), parameters=[_ID])},
        "/v1/batches": {
            "post": _operation("Make a batch", _ref("Batch"), body=_ref("NewBatch"), parameters=[key]),
            "get": _operation("List batches", _list_of("Batch"), parameters=[_AFTER, _limit(100)]),
        },
        "/v1/batches/{id}": {
            "get": _operation("One batch", _ref("Batch"), parameters=[_ID]),
            "delete": _operation("Delete a batch and its files", deleted, parameters=[_ID]),
        },
        "/v1/batches/{id}/cancel": {"post": _operation("Cancel a batch", _ref("Batch"), parameters=[_ID])},
        **{
            f"/v1/batches/{{id}}/{name}": {
                "get": _operation(f"The {name} of a batch so far", _TEXT, parameters=[_ID], answer_type=lines)
            }
            for name in ("output", "errors")
        },
        **{url: {"post": _operation("One request, ahead of all batches", body=_ref("Request"))} for url in ENDPOINTS},
        "/v1/models": {"get": _operation("The models of this service", {"type": "object"})},
        "/health/live": {"get": _operation("Does the process live?", {"type": "object"})},
    }
    return {
        "openapi": "3.0.3",
        "info": {"title": "BlendServe", "version": _version(), "description": "OpenAI's Batch API."},
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _version() -> str:
    try:
        return version("blendserve")
    except PackageNotFoundError:  # run from the sources without an install
        return "unknown"


async def send_document(_: Request) -> Response:
    return JSONResponse(document())


ROUTES = [Route("/openapi.json", send_document, methods=["GET"])]

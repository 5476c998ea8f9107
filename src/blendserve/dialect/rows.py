"""Rows of the output and the error file, in OpenAI's shapes: what the journal stores and the files hold, byte by byte.

Ids are hashes of line number and custom_id and `created` is the job's own, so that a resumed job writes the rows of an
uninterrupted one. Only `cached_tokens` tells how a run went: it depends on what else ran before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b

from blendserve.dialect.answers import with_parts
from blendserve.dialect.endpoint import AnsweredLine, Choice, FinishedChoice, StoredLine
from blendserve.dialect.endpoints import ENDPOINTS
from blendserve.dialect.extras import Extras
from blendserve.errors import CapacityError, RequestError
from blendserve.request import ServerResponse

_LINE_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def finished_choice(choice: Choice) -> FinishedChoice:
    """One choice of a line, written as its endpoint has it."""
    output, endpoint = choice.output, ENDPOINTS[choice.line.url]
    if endpoint.has_parts:
        choice = with_parts(choice)
    return FinishedChoice(
        endpoint.choice_body(choice),
        output.num_prompt_tokens,
        output.num_cached_tokens,
        len(output.token_ids),
        choice.num_reasoning_tokens,
    )


def choice_to_bytes(choice: FinishedChoice) -> bytes:
    """A choice as the journal keeps it until its line is whole."""
    counts = (choice.num_prompt_tokens, choice.num_cached_tokens, choice.num_output_tokens)
    return _to_json([choice.body, *counts, choice.num_reasoning_tokens])


def choice_from_bytes(data: bytes) -> FinishedChoice:
    return FinishedChoice(*json.loads(data))


def output_row(line: StoredLine, extras: Extras, choices: Sequence[FinishedChoice], model: str, created: int) -> bytes:
    """The row of an answered line. `choices` holds all of the line's, in order."""
    key = key_of(line.line_number, line.custom_id)
    body = ENDPOINTS[line.url].body(AnsweredLine(line, key, extras.adapter or model, created, extras, choices))
    return _row(key, line.custom_id, {"status_code": 200, "request_id": f"req_{key}", "body": body}, None)


def error_row(line_number: int, custom_id: str | None, error: Exception) -> bytes:
    """The row of a line that failed: as an HTTP response where a server would have sent one, else as a plain error."""
    key = key_of(line_number, custom_id)
    message = f"line {line_number}: {error}"
    if not isinstance(error, RequestError):
        code = "insufficient_memory" if isinstance(error, CapacityError) else "server_error"
        return _row(key, custom_id, None, {"code": code, "message": message, "line": line_number})
    if not error.status_code:
        fields = {"code": error.code, "message": message, "param": error.param, "line": line_number}
        return _row(key, custom_id, None, fields)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}
    return _row(key, custom_id, {"status_code": error.status_code, "request_id": f"req_{key}", "body": body}, None)


def served_row(line: StoredLine, response: ServerResponse, problem: Exception | None = None) -> bytes:
    """The row of a line that a remote server answered, well or not: the server's own body, untouched. `problem`: what
    is wrong with a response that says it is a success and holds no answer.
    """
    key = key_of(line.line_number, line.custom_id)
    fields = {
        "status_code": response.status_code,
        "request_id": response.request_id or f"req_{key}",
        "body": response.body,
    }
    error = None
    if problem is not None:
        code = problem.code if isinstance(problem, RequestError) else "server_error"
        error = {"code": code, "message": f"line {line.line_number}: {problem}", "line": line.line_number}
    return _row(key, line.custom_id, fields, error)


def error_code_of(row: bytes) -> str:
    """The code of an error row, for counts; the HTTP status where a remote server gave none."""
    fields = json.loads(row)
    if fields["error"]:
        return str(fields["error"]["code"])
    error = fields["response"]["body"].get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if code and isinstance(code, str) else f"http_{fields['response']['status_code']}"


def _row(key: str, custom_id: str | None, response: object, error: object) -> bytes:
    fields = {"id": f"batch_req_{key}", "custom_id": custom_id, "response": response, "error": error}
    return _to_json(fields) + b"\n"


def _to_json(value: object) -> bytes:
    """JSON that is one line to every reader: also to those that break lines at U+0085, U+2028 and U+2029."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        return (text if text.isascii() else text.translate(_LINE_BREAKS)).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a remote server may answer
        return json.dumps(value, allow_nan=False).encode()


def key_of(line_number: int, custom_id: str | None) -> str:
    """What ids of a line's row are made of."""
    return blake2b(f"{line_number} {custom_id}".encode(), digest_size=16).hexdigest()

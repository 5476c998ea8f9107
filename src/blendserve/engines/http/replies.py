"""What a server's reply means for a request: an answer, a refusal, another try later, or the end of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

from blendserve.engines.http.client import NoReplyError, Reply
from blendserve.request import ServerResponse

MAX_QUOTED_CHARACTERS = 2000
"""Of an error page that is no JSON, this much is kept."""

THROTTLED = 429
_TRANSIENT = frozenset((408, 409, 425))
_UNAVAILABLE = frozenset((502, 503, 504))
_REFUSES_CALLER = frozenset((401, 402, 407))
_MAY_BE_NO_ENDPOINT = frozenset((403, 404, 405))


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a request: a row of the output file, or of the error file where the server refused it.

    `is_doubtful`: a wrong address would have been answered so too.
    """

    response: ServerResponse
    num_prompt_tokens: int | None = None
    num_cached_tokens: int = 0
    is_doubtful: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A try that gave no answer. `response` is what the server sent, where it sent any; `code` and `message` tell what
    is wrong with it. `is_throttle`: the server is well and wants fewer requests; `is_outage`: it may be down;
    `is_unreachable`: the request never got there. `retry_after_s` is how long the server wants to be left alone.
    """

    code: str
    message: str
    response: ServerResponse | None = None
    is_throttle: bool = False
    is_outage: bool = False
    is_unreachable: bool = False
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """What no request of this run would survive: a wrong key, a wrong address, a certificate that is not trusted."""

    message: str


def judge(reply: Reply, wall_s: float) -> Answer | Failure | Stop:
    """Read one reply. `wall_s` is the Unix time, for dates in Retry-After."""
    status = reply.status_code
    if status == 200:
        return _judge_success(reply)
    if status in _REFUSES_CALLER:
        return Stop(f"HTTP {status}: {_error_message(reply)}; set BLENDSERVE_API_KEY to a key that the server accepts")
    if 300 <= status < 400:
        target = reply.headers.get("location", "nowhere")
        return Stop(f"HTTP {status}, a redirect to {target}, which is not followed; give the address itself")
    response = _error_response(reply)
    if status == THROTTLED or status in _TRANSIENT or status >= 500:
        return Failure(
            code=f"http_{status}",
            message=f"HTTP {status}: {_error_message(reply)}",
            response=response,
            is_throttle=status == THROTTLED,
            is_outage=status in _UNAVAILABLE,
            retry_after_s=parse_retry_after(reply.headers.get("retry-after"), wall_s),
        )
    if 400 <= status < 500:
        return Answer(response, is_doubtful=status in _MAY_BE_NO_ENDPOINT and not _is_about_model(response.body))
    return Failure("invalid_server_response", f"HTTP {status}, which is neither an answer nor an error")


def judge_silence(error: NoReplyError) -> Failure | Stop:
    """Read the absence of a reply."""
    if error.is_fatal:
        return Stop(f"{error}; install its certificate authority, or name it in SSL_CERT_FILE")
    is_outage = error.code != "invalid_server_response"
    return Failure(error.code, str(error), is_outage=is_outage, is_unreachable=error.is_unreachable)


def parse_retry_after(value: str | None, wall_s: float) -> float | None:
    """Seconds to wait from either form of the header, a number or a date; None where it says nothing."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - wall_s
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None


_RESULTS = ("choices", "data", "output", "results")
"""Where servers put answers: text; embeddings, scores and images; /v1/responses; rerank and moderations."""


def _judge_success(reply: Reply) -> Answer | Failure:
    content_type = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        return _invalid(f"HTTP 200 of type {content_type or 'unknown'}; it must be application/json")
    try:
        body = reply.json()
    except (ValueError, RecursionError) as error:
        return _invalid(f"HTTP 200 with a body that is not valid JSON: {error}")
    if not isinstance(body, dict) or not any(isinstance(body.get(name), list) and body[name] for name in _RESULTS):
        return _invalid(f"HTTP 200 with JSON that has none of {', '.join(_RESULTS)}")
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    details = usage.get("prompt_tokens_details", usage.get("input_tokens_details"))
    num_output = _count(usage, "completion_tokens") or _count(usage, "output_tokens") or 0
    return Answer(
        ServerResponse(200, body, reply.headers.get("x-request-id"), num_output),
        _count(usage, "prompt_tokens") or _count(usage, "input_tokens"),
        (_count(details, "cached_tokens") or 0) if isinstance(details, dict) else 0,
    )


def _invalid(message: str) -> Failure:
    return Failure("invalid_server_response", message)


def _error_response(reply: Reply) -> ServerResponse:
    """The server's own error body, or its words in OpenAI's shape where they are no JSON object."""
    try:
        body = reply.json()
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        words = reply.text[:MAX_QUOTED_CHARACTERS]
        body = {"error": {"message": words, "type": "server_error", "param": None, "code": None}}
    return ServerResponse(reply.status_code, body, reply.headers.get("x-request-id"))


def _error_message(reply: Reply) -> str:
    return words_of(_error_response(reply).body)


def words_of(body: Mapping[str, Any]) -> str:
    """What an error body says, in short."""
    error = body.get("error", body)
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:300] or "no message"


def _is_about_model(body: Mapping[str, Any]) -> bool:
    """Only an endpoint that is there misses a model."""
    error = body.get("error")
    return isinstance(error, dict) and (error.get("param") == "model" or error.get("code") == "model_not_found")


def _count(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    return value if type(value) is int and 0 <= value < 2**53 else None

"""What a server's reply means for a request: an answer, a refusal, another try later, or the end of the run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

from blendserve.dialect.urls import CHAT_URL, COMPLETIONS_URL, EMBEDDINGS_URL
from blendserve.engines.http.client import NoReplyError, Reply
from blendserve.errors import RequestError
from blendserve.request import ServerResponse

MAX_QUOTED_CHARACTERS = 2000
"""Of an error page that is no JSON, this much is kept."""

THROTTLED = 429
_SUCCESS = frozenset((200, 201, 203))
_TRANSIENT = frozenset((408, 409, 425))
_UNAVAILABLE = frozenset((502, 503, 504))
_NEVER_ABLE = frozenset((501, 505, 506, 508, 510, 511))
_REFUSES_CALLER = frozenset((401, 402, 407))
_MAY_BE_NO_ENDPOINT = frozenset((403, 404, 405))
_MAY_PASS = re.compile(
    r"rate.?limit|too.?many|overload|busy|unavailable|time.?out|timed.?out|capacity|temporar|try again|"
    r"server.?error|internal.?error",
    re.IGNORECASE,
)
_IS_REQUEST = re.compile(r"invalid.?request|bad.?request|context.?length|content.?filter|unsupported", re.IGNORECASE)
_QUOTA = "insufficient_quota"
NO_ANSWER = "no_answer"
"""The code of a reply of status 200 that holds none, where the server names no other."""
_RESULTS_BY_URL = {CHAT_URL: "choices", COMPLETIONS_URL: "choices", EMBEDDINGS_URL: "data"}
"""Where the answers of an endpoint are; one that is not listed may answer any JSON that is no error."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a request: a row of the output file, or of the error file where the server refused it.

    `problem`: what is wrong with a response of status 200 that holds no answer. `is_doubtful`: a wrong address would
    have been answered so too.
    """

    response: ServerResponse
    num_prompt_tokens: int | None = None
    num_cached_tokens: int = 0
    problem: RequestError | None = None
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


def judge(reply: Reply, wall_s: float, url: str) -> Answer | Failure | Stop:
    """Read one reply of the endpoint `url`. `wall_s` is the Unix time, for dates in Retry-After."""
    status = reply.status_code
    if status in _SUCCESS:
        return _judge_success(reply, url)
    if status in _REFUSES_CALLER:
        return Stop(f"HTTP {status}: {_error_message(reply)}; set BLENDSERVE_API_KEY to a key that the server accepts")
    if 300 <= status < 400:
        target = reply.headers.get("location", "nowhere")
        return Stop(f"HTTP {status}, a redirect to {target}, which is not followed; give the address itself")
    response = _error_response(reply)
    if status == THROTTLED and _QUOTA in _codes_of(response.body):
        return Stop(f"HTTP {status}: {_error_message(reply)}; no request is answered until the account is paid")
    if status in _NEVER_ABLE or (status >= 500 and _is_about_request(response.body)):
        return Answer(response)
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


def _judge_success(reply: Reply, url: str) -> Answer | Failure:
    """Whatever type the server says it is: JSON that holds an answer is one. What holds none will hold none the next
    time, unless the server says that its error may pass.
    """
    try:
        body = reply.json()
    except (ValueError, RecursionError) as error:
        return _no_json(
            reply, "JSON that is nested too deeply" if isinstance(error, RecursionError) else "a body that is no JSON"
        )
    if url in _RESULTS_BY_URL:
        body = _unwrapped(body)
    response = ServerResponse(reply.status_code, body, reply.headers.get("x-request-id"))
    if isinstance(body, dict) and _has_results(body, url):
        return _answer(response, body)
    if not isinstance(body, dict):
        return _no_json(reply, "JSON that is no object") if url in _RESULTS_BY_URL else Answer(response)
    if (code := _error_code(body)) is not None:
        message = f"HTTP {reply.status_code} with an error: {words_of(body)}"
        if _may_pass(body):
            return Failure("server_error", message, response)
        return Answer(response, problem=RequestError(message, code=code, status_code=0))
    if url not in _RESULTS_BY_URL:
        return _answer(response, body)
    message = f"HTTP {reply.status_code} without an answer: there are no {_RESULTS_BY_URL[url]}; body: {_quoted(reply)}"
    return Answer(response, problem=RequestError(message, code=NO_ANSWER, status_code=0))


def _has_results(body: Mapping[str, Any], url: str) -> bool:
    """Does it hold an answer, whatever else it says?"""
    results = body.get(_RESULTS_BY_URL.get(url, ""))
    return isinstance(results, list) and bool(results)


def _answer(response: ServerResponse, body: Mapping[str, Any]) -> Answer:
    """With the counts of tokens, under the names of either of OpenAI's endpoints."""
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    details = usage.get("prompt_tokens_details", usage.get("input_tokens_details"))
    num_output = _count(usage, "completion_tokens") or _count(usage, "output_tokens") or 0
    return Answer(
        replace(response, num_output_tokens=num_output),
        _count(usage, "prompt_tokens") or _count(usage, "input_tokens"),
        (_count(details, "cached_tokens") or 0) if isinstance(details, dict) else 0,
    )


def _unwrapped(body: Any) -> Any:
    """The one object of a list: Google's servers put errors into such lists."""
    return body[0] if isinstance(body, list) and len(body) == 1 and isinstance(body[0], dict) else body


def _no_json(reply: Reply, what: str) -> Failure:
    kind = reply.headers.get("content-type", "").partition(";")[0].strip() or "no type"
    return Failure(
        "invalid_server_response",
        f"HTTP {reply.status_code} with {what}; type: {kind}; body: {_quoted(reply)}",
    )


def _quoted(reply: Reply) -> str:
    return reply.text[:300].strip() or "empty"


def _error_code(body: Mapping[str, Any]) -> str | None:
    """The code of an error that a body of status 200 is; None where it is no error."""
    if not body.get("error") and "error" not in (body.get("object"), body.get("type")):
        return None
    codes = _codes_of(body)
    return next((code for code in codes if code and not code.isdigit()), None) or NO_ANSWER


def _codes_of(body: Mapping[str, Any]) -> list[str]:
    """Every name and number that an error body gives its kind."""
    error = body.get("error")
    fields = error if isinstance(error, dict) else body
    names = ("code", "type", "status", "error_type")
    return [str(fields[name]) for name in names if isinstance(fields.get(name), str | int)]


def _may_pass(body: Mapping[str, Any]) -> bool:
    codes = _codes_of(body)
    numbers = [int(code) for code in codes if code.isdigit() and len(code) == 3]
    if numbers:
        return any(number in _TRANSIENT or number == THROTTLED or number >= 500 for number in numbers)
    return not _is_about_request(body) and any(_MAY_PASS.search(text) for text in (*codes, words_of(body)))


def _is_about_request(body: Mapping[str, Any]) -> bool:
    """Is the request at fault, and will be again?"""
    return any(_IS_REQUEST.search(code) for code in _codes_of(body))


def _error_response(reply: Reply) -> ServerResponse:
    """The server's own error body, or its words in OpenAI's shape where they are no JSON object."""
    try:
        body = _unwrapped(reply.json())
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
    error = next((body[name] for name in ("error", "message", "detail", "errors") if body.get(name)), body)
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:300] or "no message"


def _is_about_model(body: Mapping[str, Any]) -> bool:
    """Only an endpoint that is there misses a model."""
    error = body.get("error")
    return isinstance(error, dict) and (error.get("param") == "model" or error.get("code") == "model_not_found")


def _count(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    return value if type(value) is int and 0 <= value < 2**53 else None

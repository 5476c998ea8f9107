"""What a reply means: one table of statuses and bodies, and both forms of Retry-After."""

from __future__ import annotations

import json
from email.utils import formatdate
from typing import Any

import pytest

from blendserve.engines.http.client import ApiKey, NoReplyError, Reply
from blendserve.engines.http.replies import Answer, Failure, Stop, judge, judge_silence, parse_retry_after

WALL_S = 1_700_000_000.0
JSON = {"content-type": "application/json; charset=utf-8"}
GOOD = {"choices": [{"index": 0}], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}


def reply(status: int, body: Any = None, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {**JSON, **named}, body if isinstance(body, str) else json.dumps(body))


def test_an_answer_keeps_body_and_usage() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 4}}
    verdict = judge(reply(200, {**GOOD, "usage": {**GOOD["usage"], **details}}, x_request_id="req-1"), WALL_S)  # type: ignore[dict-item]
    assert isinstance(verdict, Answer)
    assert verdict.response.body["choices"] == GOOD["choices"]
    assert verdict.response.request_id == "req-1"
    assert (verdict.num_prompt_tokens, verdict.num_cached_tokens, verdict.response.num_output_tokens) == (5, 4, 3)


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": "5"}, {"completion_tokens": -1}])
def test_usage_that_is_none_is_no_mistake(usage: Any) -> None:
    verdict = judge(reply(200, {**GOOD, "usage": usage}), WALL_S)
    assert isinstance(verdict, Answer)
    assert verdict.num_prompt_tokens is None
    assert verdict.response.num_output_tokens == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"choices": []}',
        '{"choices": "x"}',
        '{"error": {"message": "no"}}',
        '{"choices": [NaN]}',
        '{"choices": [1e999]}',
        "[" * 100_000,
        '{"choices": [' + "9" * 5000 + "]}",
    ],
)
def test_a_200_that_is_no_answer_is_tried_again(text: str) -> None:
    verdict = judge(reply(200, text), WALL_S)
    assert isinstance(verdict, Failure)
    assert verdict.code == "invalid_server_response"
    assert not verdict.is_outage


def test_a_200_of_another_type_is_tried_again() -> None:
    verdict = judge(Reply(200, {"content-type": "text/html"}, json.dumps(GOOD)), WALL_S)
    assert isinstance(verdict, Failure)
    assert "text/html" in verdict.message
    assert isinstance(judge(Reply(200, {"content-type": "application/vnd.x+json"}, json.dumps(GOOD)), WALL_S), Answer)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, Answer) for status in (400, 403, 404, 413, 422)),
        *((status, Failure) for status in (204, 408, 409, 425, 429, 500, 503, 529)),
        *((status, Stop) for status in (401, 402, 407, 301, 307)),
    ],
)
def test_every_status_has_its_meaning(status: int, kind: type) -> None:
    verdict = judge(reply(status, {"error": {"message": "because", "code": "c"}}), WALL_S)
    assert isinstance(verdict, kind)
    if isinstance(verdict, Failure) and status >= 400:
        assert verdict.is_throttle == (status == 429)
        assert verdict.is_outage == (status in (502, 503, 504))
        assert "because" in verdict.message


@pytest.mark.parametrize(
    ("status", "error", "is_doubtful"),
    [
        (404, {"message": "Not Found"}, True),
        (403, "forbidden", True),
        (405, {"message": "POST?", "param": None}, True),
        (404, {"message": "no model m", "param": "model", "code": 404}, False),
        (403, {"message": "not yours", "code": "model_not_found"}, False),
        (400, {"message": "bad"}, False),
    ],
)
def test_a_wrong_address_is_told_from_a_missing_model(status: int, error: Any, is_doubtful: bool) -> None:
    verdict = judge(reply(status, {"error": error}), WALL_S)
    assert isinstance(verdict, Answer)
    assert verdict.is_doubtful == is_doubtful


@pytest.mark.parametrize("text", ["", "Bad Gateway", '"words"', '{"detail": "no"}', '{"error": "flat"}', "x" * 9999])
def test_an_error_body_is_kept_or_quoted(text: str) -> None:
    verdict = judge(reply(400, text), WALL_S)
    assert isinstance(verdict, Answer)
    body = verdict.response.body
    if text.startswith("{"):
        assert body == json.loads(text)
    else:
        assert body["error"]["message"] == text[:2000]
    assert isinstance(judge(reply(500, text), WALL_S), Failure)


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_key_in_escapes_is_taken_out_too(status: int) -> None:
    secret = "sk-very/secret-0123456789"
    written = secret.replace("/", r"\/").replace("k", r"\u006b")
    text = f'{{"choices": [{{"{written}": ["heard {written}"]}}], "error": {{"message": "not {written}"}}}}'
    assert secret in str(json.loads(text))
    verdict = judge(Reply(status, JSON, text, ApiKey(secret)), WALL_S)
    assert "[api key]" in str(verdict)
    assert secret not in str(verdict)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("later", None),
        ("3", 3.0),
        ("0.25", 0.25),
        ("-5", 0.0),
        ("inf", None),
        ("nan", None),
        (formatdate(WALL_S + 90, usegmt=True), 90.0),
        (formatdate(WALL_S - 90, usegmt=True), 0.0),
        ("Tue, 14 Nov 2023 22:13:30 -0000", 10.0),
        ("Tue, 14 Nov 2023 22:13:30 +99999999999999", None),
        ("Tue, 14 Nov 99999999999999999999 22:13:30 GMT", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, WALL_S) == seconds


def test_silence_is_an_outage_unless_the_response_was_at_fault() -> None:
    broken = judge_silence(NoReplyError("cut", code="connection_error"))
    away = judge_silence(NoReplyError("refused", code="connection_error", is_unreachable=True))
    huge = judge_silence(NoReplyError("huge", code="invalid_server_response"))
    untrusted = judge_silence(NoReplyError("bad certificate", code="connection_error", is_fatal=True))
    assert isinstance(broken, Failure)
    assert isinstance(away, Failure)
    assert isinstance(huge, Failure)
    assert [(f.is_outage, f.is_unreachable) for f in (broken, away, huge)] == [
        (True, False),
        (True, True),
        (False, False),
    ]
    assert isinstance(untrusted, Stop)

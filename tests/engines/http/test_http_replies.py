"""What a reply means: one table of statuses and bodies, and both forms of Retry-After."""

from __future__ import annotations

import gzip
import json
from email.utils import formatdate
from typing import Any

import pytest

from blendserve.dialect.urls import CHAT_URL, EMBEDDINGS_URL
from blendserve.engines.http.bodies import json_of, text_of
from blendserve.engines.http.client import NoReplyError, Reply
from blendserve.engines.http.credentials import Credentials
from blendserve.engines.http.replies import Answer, Failure, Stop, judge, judge_silence, parse_retry_after
from blendserve.errors import RequestError

WALL_S = 1_700_000_000.0
JSON = {"content-type": "application/json; charset=utf-8"}
GOOD = {"choices": [{"index": 0}], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}


def reply(status: int, body: Any = None, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {**JSON, **named}, body if isinstance(body, str) else json.dumps(body))


def test_an_answer_keeps_body_and_usage() -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 4}}
    verdict = judge(reply(200, {**GOOD, "usage": {**GOOD["usage"], **details}}, x_request_id="req-1"), WALL_S, CHAT_URL)  # type: ignore[dict-item]
    assert isinstance(verdict, Answer)
    assert verdict.response.body["choices"] == GOOD["choices"]
    assert verdict.response.request_id == "req-1"
    assert (verdict.num_prompt_tokens, verdict.num_cached_tokens, verdict.response.num_output_tokens) == (5, 4, 3)


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": "5"}, {"completion_tokens": -1}])
def test_usage_that_is_none_is_no_mistake(usage: Any) -> None:
    verdict = judge(reply(200, {**GOOD, "usage": usage}), WALL_S, CHAT_URL)
    assert isinstance(verdict, Answer)
    assert verdict.num_prompt_tokens is None
    assert verdict.response.num_output_tokens == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "<html>", "[" * 100_000, '{"choices": [' + "9" * 5000 + "]}"])
def test_a_200_that_is_no_json_object_is_tried_again(text: str) -> None:
    verdict = judge(reply(200, text), WALL_S, CHAT_URL)
    assert isinstance(verdict, Failure)
    assert verdict.code == "invalid_server_response"
    assert not verdict.is_outage
    assert text[:100] in verdict.message


@pytest.mark.parametrize("body", [{"choices": []}, {"choices": "x"}, {"id": "r", "usage": {}}, {"detail": "not today"}])
def test_a_200_without_an_answer_is_final_and_its_words_are_kept(body: Any) -> None:
    verdict = judge(reply(200, body), WALL_S, CHAT_URL)
    assert isinstance(verdict, Answer)
    assert isinstance(verdict.problem, RequestError)
    assert verdict.problem.code == "no_answer"
    assert json.dumps(body) in verdict.problem.message
    assert verdict.response.body == body


@pytest.mark.parametrize(
    ("body", "code", "may_pass"),
    [
        ({"error": {"message": "no such thing", "code": 400}}, "no_answer", False),
        ({"error": {"message": "no such thing", "type": "invalid_request_error"}}, "invalid_request_error", False),
        ({"error": "no such thing"}, "no_answer", False),
        ({"error": {"message": "no such thing", "code": "content_filter"}, "choices": None}, "content_filter", False),
        ({"object": "error", "message": "no such thing", "code": 40303}, "no_answer", False),
        (
            {"type": "error", "error": {"type": "overloaded_error", "message": "no such thing"}},
            "server_error",
            True,
        ),
        ({"error": {"message": "no such thing", "code": 502}}, "server_error", True),
        ({"error": {"message": "no such thing", "code": 429}}, "server_error", True),
        ({"error": {"message": "no such thing", "code": "rate_limit_exceeded"}}, "server_error", True),
        ({"error": {"message": "no such thing, try again later"}}, "server_error", True),
    ],
)
def test_a_200_with_an_error_is_tried_again_where_it_may_pass(body: Any, code: str, may_pass: bool) -> None:
    verdict = judge(reply(200, body), WALL_S, CHAT_URL)
    if may_pass:
        assert isinstance(verdict, Failure)
        assert (verdict.code, verdict.response and verdict.response.body) == (code, body)
        assert "no such thing" in verdict.message
    else:
        assert isinstance(verdict, Answer)
        assert isinstance(verdict.problem, RequestError)
        assert verdict.problem.code == code
        assert "no such thing" in verdict.problem.message


def test_an_answer_beside_an_error_is_an_answer() -> None:
    verdict = judge(reply(200, {**GOOD, "error": {"message": "a tool failed"}}), WALL_S, CHAT_URL)
    assert isinstance(verdict, Answer)
    assert verdict.problem is None


@pytest.mark.parametrize("content_type", ["text/html", "text/plain; charset=utf-8", "", "application/vnd.x+json"])
def test_an_answer_is_taken_whatever_its_type(content_type: str) -> None:
    verdict = judge(Reply(200, {"content-type": content_type}, json.dumps(GOOD)), WALL_S, CHAT_URL)
    assert isinstance(verdict, Answer)
    assert verdict.problem is None


def test_a_mark_of_byte_order_is_no_obstacle() -> None:
    verdict = judge(reply(200, "\ufeff" + json.dumps(GOOD)), WALL_S, CHAT_URL)
    assert isinstance(verdict, Answer)
    assert verdict.problem is None


USABLE = {
    "characters behind it": json.dumps(GOOD) + "\r\n0\r\n",
    "twice": json.dumps(GOOD) + "\n" + json.dumps(GOOD),
    "comments before it": f": keep-alive\n\n: keep-alive\n{json.dumps(GOOD)}",
    "in a list": json.dumps([GOOD]),
    "a line break within a text": json.dumps({**GOOD, "note": "a@b"}).replace("@", "\n"),
}


@pytest.mark.parametrize("text", USABLE.values(), ids=USABLE)
def test_what_surrounds_an_answer_does_not_cost_it(text: str) -> None:
    verdict = judge(reply(200, text), WALL_S, CHAT_URL)
    assert isinstance(verdict, Answer)
    assert verdict.problem is None
    assert verdict.response.body["choices"] == GOOD["choices"]


@pytest.mark.parametrize("name", ["utf-16", "utf-8-sig", "utf-32-le", "latin-1", "packed"])
def test_the_encoding_of_a_body_is_seen_where_nobody_says_it(name: str) -> None:
    text = json.dumps({"text": "café"}, ensure_ascii=False)
    data = gzip.compress(text.encode()) if name == "packed" else text.encode(name)
    kind = "application/json; charset=iso-8859-1" if name == "latin-1" else "application/json"
    assert json_of(text_of(data, kind, 1 << 20)) == {"text": "café"}


def test_a_packed_body_is_unpacked_up_to_the_limit() -> None:
    assert len(text_of(gzip.compress(b"x" * (1 << 20)), "", 1000)) == 1000
    assert text_of(b"\x1f\x8bno gzip", "", 1000).endswith("no gzip")


def test_an_error_in_a_list_keeps_its_words() -> None:
    verdict = judge(reply(400, [{"error": {"code": 400, "message": "no such thing"}}]), WALL_S, CHAT_URL)
    assert isinstance(verdict, Answer)
    assert verdict.response.body == {"error": {"code": 400, "message": "no such thing"}}


def test_numbers_that_json_cannot_hold_do_not_cost_the_answer() -> None:
    text = (
        '{"choices": [{"logprobs": {"content": [{"logprob": -Infinity, "top_logprobs": [{"logprob": NaN}]}]},'
        ' "score": -Infinity, "big": 1e999}], "usage": {"completion_tokens": 3}}'
    )
    verdict = judge(reply(200, text), WALL_S, CHAT_URL)
    assert isinstance(verdict, Answer)
    (choice,) = verdict.response.body["choices"]
    assert choice["logprobs"]["content"] == [{"logprob": -9999.0, "top_logprobs": [{"logprob": None}]}]
    assert (choice["score"], choice["big"]) == (None, None)
    assert verdict.response.num_output_tokens == 3


@pytest.mark.parametrize(
    ("url", "body", "is_answer"),
    [
        (EMBEDDINGS_URL, {"data": [{"embedding": [0.5]}]}, True),
        (EMBEDDINGS_URL, {"data": []}, False),
        ("/v1/responses", {"output": [], "error": None, "status": "incomplete"}, True),
        ("/v1/responses", {"output": [], "error": {"code": "invalid_prompt", "message": "no"}}, False),
        ("/v1/moderations", {"results": [{}]}, True),
        ("/rerank", [{"index": 0, "score": 0.5}], True),
        ("/tokenize", {"tokens": [1]}, True),
        ("/tokenize", {"error": "no"}, False),
    ],
)
def test_what_an_answer_is_depends_on_the_endpoint(url: str, body: Any, is_answer: bool) -> None:
    verdict = judge(reply(200, body), WALL_S, url)
    assert isinstance(verdict, Answer)
    assert (verdict.problem is None) == is_answer
    assert verdict.response.body == body


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (501, {"message": "not here"}, Answer),
        (505, {"message": "not here"}, Answer),
        (500, {"message": "too long", "code": "context_length_exceeded"}, Answer),
        (500, {"message": "oops", "type": "server_error"}, Failure),
        (429, {"message": "pay first", "code": "insufficient_quota"}, Stop),
        (429, {"message": "slow down", "code": "rate_limit_exceeded"}, Failure),
    ],
)
def test_what_cannot_change_is_not_asked_again(status: int, error: Any, kind: type) -> None:
    assert isinstance(judge(reply(status, {"error": error}), WALL_S, CHAT_URL), kind)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, Answer) for status in (400, 403, 404, 413, 422)),
        *((status, Failure) for status in (202, 204, 408, 409, 425, 429, 500, 503, 529)),
        *((status, Stop) for status in (401, 402, 407, 301, 307)),
    ],
)
def test_every_status_has_its_meaning(status: int, kind: type) -> None:
    verdict = judge(reply(status, {"error": {"message": "because", "code": "c"}}), WALL_S, CHAT_URL)
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
    verdict = judge(reply(status, {"error": error}), WALL_S, CHAT_URL)
    assert isinstance(verdict, Answer)
    assert verdict.is_doubtful == is_doubtful


@pytest.mark.parametrize("text", ["", "Bad Gateway", '"words"', '{"detail": "no"}', '{"error": "flat"}', "x" * 9999])
def test_an_error_body_is_kept_or_quoted(text: str) -> None:
    verdict = judge(reply(400, text), WALL_S, CHAT_URL)
    assert isinstance(verdict, Answer)
    body = verdict.response.body
    if text.startswith("{"):
        assert body == json.loads(text)
    else:
        assert body["error"]["message"] == text[:2000]
    assert isinstance(judge(reply(500, text), WALL_S, CHAT_URL), Failure)


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_key_in_escapes_is_taken_out_too(status: int) -> None:
    secret = "sk-very/secret-0123456789"
    written = secret.replace("/", r"\/").replace("k", r"\u006b")
    text = f'{{"choices": [{{"{written}": ["heard {written}"]}}], "error": {{"message": "not {written}"}}}}'
    assert secret in str(json.loads(text))
    verdict = judge(Reply(status, JSON, text, Credentials(secret)), WALL_S, CHAT_URL)
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

"""Addresses, keys, and one exchange."""

from __future__ import annotations

import asyncio
import ssl

import httpx2
import pytest

from blendserve.engines.http import fake_server
from blendserve.engines.http.address import ServerAddress
from blendserve.engines.http.client import HttpClient, NoReplyError, Reply
from blendserve.engines.http.credentials import Credentials, find_credentials
from blendserve.engines.http.fake_server import FakeSettings, serving
from blendserve.errors import ConfigError

CHAT = "/v1/chat/completions"
SECRET = "sk-very-secret-0123456789"
BODY = b'{"messages": [{"role": "user", "content": "hi"}]}'


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/", "http://localhost:8000/v1/chat/completions"),
        (" http://localhost:8000/v1/ ", "http://localhost:8000/v1/chat/completions"),
        ("https://api.example.com/openai/v1", "https://api.example.com/openai/v1/chat/completions"),
        ("https://example.com/v1beta/openai", "https://example.com/v1beta/openai/chat/completions"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1/chat/completions"),
        ("http://münchen.example./v1", "http://münchen.example./v1/chat/completions"),
        ("http://localhost:8000/v1/chat/completions", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/v1/completions/", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/chat/completions", "http://localhost:8000/chat/completions"),
        ("http://localhost:8000/v1?tenant=a", "http://localhost:8000/v1/chat/completions?tenant=a"),
        (
            "https://r.openai.azure.com/openai/deployments/d/?api-version=2024-10-21",
            "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21",
        ),
        (
            "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=1",
            "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=1",
        ),
        ("https://r.openai.azure.com", "https://r.openai.azure.com/openai/v1/chat/completions"),
    ],
)
def test_base_urls_are_those_of_openais_clients(text: str, url: str) -> None:
    assert ServerAddress.parse(text).url_of(CHAT) == url


@pytest.mark.parametrize(
    ("base_url", "endpoint", "url"),
    [
        ("http://x:1", "/v1/embeddings", "http://x:1/v1/embeddings"),
        ("http://x:1", "/rerank", "http://x:1/rerank"),
        ("http://x:1/v1/", "/tokenize", "http://x:1/tokenize"),
        ("https://x/v2", "/v2/rerank", "https://x/v2/rerank"),
        ("https://x/api/v1", "/v2/rerank", "https://x/api/v2/rerank"),
        (
            "https://x/openai/deployments/d?api-version=1",
            "/rerank",
            "https://x/openai/deployments/d/rerank?api-version=1",
        ),
    ],
)
def test_an_endpoint_without_v1_stands_beside_it(base_url: str, endpoint: str, url: str) -> None:
    assert ServerAddress.parse(base_url).url_of(endpoint) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:8000",
        "ftp://x",
        "http://",
        "http://x:notaport",
        "http://user:pw@x/v1",
        "http://x/v1?key=s",
        "http://x/v1?api-version=1&api-key=s",
        "http://x/v1?access_token=key=s",
        "http://x/v1?code=key=s",
        "http://x#y",
    ],
)
def test_other_addresses_are_refused_and_secrets_in_them_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerAddress.parse(text)
    assert "pw" not in str(caught.value)
    assert "key=s" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://192.168.1.300:8000",
        "http://☃:8000/v1",
        "http://gpu..example/v1",
        f"https://{'a' * 64}.example/v1",
        "http://localhost:0/v1",
        "http://localhost:80000/v1",
        "http://[fe80::zz]/v1",
        f"http://x/{'a/' * 40_000}",
    ],
)
def test_an_address_to_which_nothing_can_be_sent_is_refused_and_a_good_one_shown(text: str) -> None:
    with pytest.raises(ConfigError, match="must look like http://localhost:8000/v1"):
        ServerAddress.parse(text)


@pytest.mark.parametrize(
    ("base_url", "environment", "expected"),
    [
        ("http://localhost:1", {}, ""),
        ("http://localhost:1", {"OPENAI_API_KEY": "a\n"}, "a"),
        ("http://127.0.0.9:1", {"OPENAI_API_KEY": "a", "BLENDSERVE_API_KEY": "b"}, "b"),
        ("https://example.com", {"OPENAI_API_KEY": "a"}, "a"),
        ("http://example.com", {"OPENAI_API_KEY": "a"}, ""),
        ("http://example.com", {"BLENDSERVE_API_KEY": "b"}, "b"),
    ],
)
def test_keys_come_from_the_environment_and_general_ones_stay_private(
    base_url: str, environment: dict[str, str], expected: str
) -> None:
    assert find_credentials(environment, ServerAddress.parse(base_url)).key == expected


def test_a_key_shows_nowhere_and_is_taken_out_of_texts() -> None:
    key = Credentials(SECRET)
    assert SECRET not in repr(key)
    assert key.redact(f"a {SECRET} b") == "a [api key] b"
    assert Credentials("EMPTY").redact("EMPTY words") == "EMPTY words"
    assert Credentials("").sent == {}
    with pytest.raises(ConfigError) as caught:
        Credentials("sk secret")
    assert "sk secret" not in str(caught.value)


def test_headers_of_the_user_go_with_every_request_and_their_secrets_are_shown_nowhere() -> None:
    headers = {"X-Title": "My application", "api-key": SECRET, "Cookie": "a=1; session=0123456789abcdef"}
    credentials = Credentials(headers=headers)
    assert credentials.sent == headers
    assert credentials.has_secret
    assert "0123456789" not in repr(credentials)
    heard = f"you are My application, {SECRET}, 0123456789abcdef"
    assert credentials.redact(heard) == "you are My application, [api key], [api key]"
    bearer = Credentials("key-of-the-environment", {"authorization": f"Bearer {SECRET}"})
    assert bearer.sent == {"authorization": f"Bearer {SECRET}"}, "the user's own header comes first"
    assert bearer.redact(f"{SECRET} key-of-the-environment") == "[api key] [api key]"


@pytest.mark.parametrize(
    ("name", "value"),
    [("", "x"), ("a b", "x"), ("a:", "x"), ("a", ""), ("a", "x\r\nb: y"), ("a", "é"), ("Content-Length", "3")],
)
def test_headers_that_no_request_can_hold_are_refused_and_not_repeated(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match="--header") as caught:
        Credentials(headers={name: value})
    assert "b: y" not in str(caught.value)


def test_azure_takes_keys_in_its_own_header_and_tokens_as_others_do() -> None:
    azure, plain = ServerAddress.parse("https://r.openai.azure.com"), ServerAddress.parse("https://example.com")
    environment = {"BLENDSERVE_API_KEY": SECRET}
    assert find_credentials(environment, azure).sent == {"api-key": SECRET}
    assert find_credentials(environment, plain).sent == {"Authorization": f"Bearer {SECRET}"}
    token = "eyJhbGciOiJ.eyJzdWIiOiJ"
    assert find_credentials({"BLENDSERVE_API_KEY": token}, azure).sent == {"Authorization": f"Bearer {token}"}


def test_a_general_key_is_not_sent_beside_a_secret_of_the_users_own() -> None:
    address, environment = ServerAddress.parse("https://example.com"), {"OPENAI_API_KEY": SECRET}
    assert find_credentials(environment, address, {"x-api-key": "other-secret-value"}).key == ""
    assert find_credentials(environment, address, {"X-Title": "My application"}).key == SECRET


def test_bytes_that_are_no_text_do_not_cost_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_server, "answer", lambda *_: (200, b'{"heard": "caf\xe9"}'))
    with serving() as server:
        assert asyncio.run(post(server.base_url)).json() == {"heard": "caf\ufffd"}
    original = fake_server._response

    def in_latin_1(status: int, content: bytes, *_: str) -> bytes:
        return original(status, content, "Content-Type: application/json; charset=ISO-8859-1")

    monkeypatch.setattr(fake_server, "_response", in_latin_1)
    with serving() as server:
        assert asyncio.run(post(server.base_url)).json() == {"heard": "café"}


@pytest.mark.parametrize("charset", ["rot13", "hex", "nonsense", "utf-16", "idna", "punycode", "undefined"])
def test_an_encoding_that_does_not_fit_raises_nothing(monkeypatch: pytest.MonkeyPatch, charset: str) -> None:
    original = fake_server._response
    content_type = f"Content-Type: application/json; charset={charset}"
    monkeypatch.setattr(fake_server, "_response", lambda status, content, *_: original(status, content, content_type))
    with serving() as server:
        assert isinstance(asyncio.run(post(server.base_url)).text, str)


async def post(base_url: str, **fields: float) -> Reply:
    async with HttpClient(
        ServerAddress.parse(base_url),
        Credentials(SECRET),
        timeout_s=fields.pop("timeout_s", 5.0),
        max_connections=4,
        max_response_bytes=int(fields.pop("max_response_bytes", 1 << 20)),
    ) as client:
        return await client.post(CHAT, BODY)


def test_a_key_that_comes_back_in_escapes_is_taken_out_of_what_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'{"heard": ["' + SECRET.replace("s", r"\u0073").encode() + b'"]}'
    monkeypatch.setattr(fake_server, "answer", lambda *_: (200, content))
    with serving() as server:
        reply = asyncio.run(post(server.base_url))
    assert reply.json() == {"heard": ["[api key]"]}


def test_a_redirect_is_not_followed() -> None:
    with serving() as other, serving(FakeSettings(redirect_to=f"{other.base_url}/chat/completions")) as server:
        reply = asyncio.run(post(server.base_url))
    assert reply.status_code == 307
    assert len(server.exchanges) == 1
    assert other.exchanges == [], "neither the request nor the key went on"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("reset", "connection_error"),
        ("closed", "connection_error"),
        ("truncated", "connection_error"),
        ("hang", "request_timeout"),
        ("slow", "request_timeout"),
        ("huge", "invalid_server_response"),
    ],
)
def test_no_whole_response_has_a_reason(fault: str, code: str) -> None:
    settings = FakeSettings(faults={fault: 1.0}, byte_interval_s=0.02)
    with serving(settings) as server, pytest.raises(NoReplyError) as caught:
        asyncio.run(post(server.base_url, timeout_s=0.3, max_response_bytes=10_000))
    assert caught.value.code == code
    assert not caught.value.is_unreachable


def test_a_server_that_is_not_there_is_unreachable() -> None:
    with serving() as server:
        base_url = server.base_url
    with pytest.raises(NoReplyError, match="no connection") as caught:
        asyncio.run(post(base_url))
    assert caught.value.is_unreachable
    assert not caught.value.is_fatal


def test_tls_is_verified_and_an_untrusted_certificate_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    client = HttpClient(ServerAddress.parse("https://localhost"), Credentials(SECRET), timeout_s=1, max_connections=40)
    assert client.ssl_context.verify_mode == ssl.CERT_REQUIRED
    assert client.ssl_context.check_hostname

    async def refuse(*_: object) -> Reply:
        raise httpx2.ConnectError("tls") from ssl.SSLCertVerificationError("self-signed certificate")

    monkeypatch.setattr(client, "_post", refuse)
    with pytest.raises(NoReplyError) as caught:
        asyncio.run(client.post(CHAT, BODY))
    assert caught.value.is_fatal


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ALL_PROXY", "socks5://me:pw@localhost:1", "a proxy that the environment names cannot be used"),
        ("HTTPS_PROXY", "socks://me:pw@localhost:1", "a proxy that the environment names cannot be used"),
        ("HTTPS_PROXY", "http://me:pw@192.168.1.300:1", "a proxy that the environment names cannot be used"),
        ("SSL_CERT_FILE", "/nowhere.pem", "certificates cannot be read.*SSL_CERT_FILE"),
    ],
)
def test_an_environment_that_cannot_be_used_is_named(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words) as caught:
        HttpClient(ServerAddress.parse("https://example.com"), Credentials(), timeout_s=1, max_connections=4)
    assert "pw" not in str(caught.value)


def test_many_requests_share_connections_and_no_more_are_opened() -> None:
    async def post_many(base_url: str) -> list[Reply]:
        address = ServerAddress.parse(base_url)
        async with HttpClient(address, Credentials(), timeout_s=5, max_connections=40) as client:
            return await asyncio.gather(*(client.post(CHAT, BODY) for _ in range(40)))

    with serving(FakeSettings(latency_s=0.1)) as server:
        replies = asyncio.run(post_many(server.base_url))
        assert [reply.status_code for reply in replies] == [200] * 40
        assert 32 < server.max_open <= 40, "over more than one pool"

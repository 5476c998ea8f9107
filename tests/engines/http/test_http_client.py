"""Addresses, keys, and one exchange."""

from __future__ import annotations

import asyncio
import ssl

import httpx2
import pytest

from blendserve.engines.http import fake_server
from blendserve.engines.http.client import ApiKey, HttpClient, NoReplyError, Reply, ServerAddress, find_api_key
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
    ],
)
def test_base_urls_are_those_of_openais_clients(text: str, url: str) -> None:
    assert ServerAddress.parse(text).url_of(CHAT) == url


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
    assert find_api_key(environment, ServerAddress.parse(base_url)).value == expected


def test_a_key_shows_nowhere_and_is_taken_out_of_texts() -> None:
    key = ApiKey(SECRET)
    assert SECRET not in repr(key)
    assert key.redact(f"a {SECRET} b") == "a [api key] b"
    assert ApiKey("EMPTY").redact("EMPTY words") == "EMPTY words"
    assert ApiKey("").headers == {}
    with pytest.raises(ConfigError) as caught:
        ApiKey("sk secret")
    assert "sk secret" not in str(caught.value)


async def post(base_url: str, **fields: float) -> Reply:
    async with HttpClient(
        ServerAddress.parse(base_url),
        ApiKey(SECRET),
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
    client = HttpClient(ServerAddress.parse("https://localhost"), ApiKey(SECRET), timeout_s=1, max_connections=40)
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
        ("ALL_PROXY", "socks5://me:pw@localhost:1", "a proxy of the environment cannot be used"),
        ("HTTPS_PROXY", "socks://me:pw@localhost:1", "a proxy of the environment cannot be used"),
        ("HTTPS_PROXY", "http://me:pw@192.168.1.300:1", "a proxy of the environment cannot be used"),
        ("SSL_CERT_FILE", "/nowhere.pem", "certificates cannot be read.*SSL_CERT_FILE"),
    ],
)
def test_an_environment_that_cannot_be_used_is_named(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words) as caught:
        HttpClient(ServerAddress.parse("https://example.com"), ApiKey(), timeout_s=1, max_connections=4)
    assert "pw" not in str(caught.value)


def test_many_requests_share_connections_and_no_more_are_opened() -> None:
    async def post_many(base_url: str) -> list[Reply]:
        address = ServerAddress.parse(base_url)
        async with HttpClient(address, ApiKey(), timeout_s=5, max_connections=40) as client:
            return await asyncio.gather(*(client.post(CHAT, BODY) for _ in range(40)))

    with serving(FakeSettings(latency_s=0.1)) as server:
        replies = asyncio.run(post_many(server.base_url))
        assert [reply.status_code for reply in replies] == [200] * 40
        assert 32 < server.max_open <= 40, "over more than one pool"

"""An OpenAI-compatible server that makes up its answers, and misbehaves as it is told: for tests and dry runs.

    python -m blendserve.engines.http.fake_server --port 8000 --faults reset=0.1,throttle=0.2

The same request always gets the same answer. Which try of it meets which fault follows from `seed`; after
`max_faults` faults a request is answered, so that a client which tries often enough gets everything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import blake2b
from typing import Any

FAULTS = (
    "reset",  # the connection is cut with RST instead of a response
    "closed",  # it is closed in good order, without one
    "truncated",  # half of the response comes
    "slow",  # one byte at a time
    "hang",  # nothing comes at all
    "malformed",  # 200 with half a JSON object
    "html",  # 200 with a page, as a proxy sends
    "empty",  # 200 with nothing
    "busy",  # 200 with an error that says it will pass
    "huge",  # 200 with `huge_bytes` of JSON
    "error",  # 500
    "unavailable",  # 503
    "throttle",  # 429 with Retry-After
)
_WORDS = ("alpha", "bravo", "carol", "delta", "echo", "fox", "golf", "hotel")
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 429: "Too Many Requests", 500: "Internal Server Error"}
_DEFAULT_MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class FakeSettings:
    """`faults`: the chance of each on any try. The first `num_storm` tries of all get 429 whatever the chances.
    `retry_after` is sent as it is; "date" stands for the date one second ahead. `refused_status`: given to bodies
    without messages or prompt. `redirect_to`: every request is sent there. `throttled_model`: requests for it get 429,
    always.
    """

    faults: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    max_faults: int = 3
    num_storm: int = 0
    retry_after: str = "1"
    latency_s: float = 0.0
    byte_interval_s: float = 0.05
    huge_bytes: int = 1 << 20
    refused_status: int = 400
    redirect_to: str = ""
    throttled_model: str = ""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as it came. `fault` is None where it was answered."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    fault: str | None

    @property
    def key(self) -> str:
        return _digest(self.body)


class FakeServer:
    """Listens between `start` and `close`, and remembers every exchange in `exchanges`."""

    def __init__(self, settings: FakeSettings | None = None) -> None:
        self.settings = settings or FakeSettings()
        self.exchanges: list[Exchange] = []
        self.max_open = 0
        self.port = 0
        self._num_open = 0
        self._num_faults: Counter[str] = Counter()
        self._random = random.Random(self.settings.seed)
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def num_answers_by_key(self) -> Counter[str]:
        """How often each distinct request was answered."""
        return Counter(exchange.key for exchange in self.exchanges if exchange.fault is None)

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = await asyncio.start_server(self._connected, host, port, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening, and cut every connection."""
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (request := await _read_request(reader)) is not None and await self._serve(*request, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # the client went away, or `close` was called
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, path: str, headers: Mapping[str, str], body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Respond once. Returns: may the connection serve another request?"""
        self._num_open += 1
        self.max_open = max(self.max_open, self._num_open)
        try:
            fault = self._next_fault(body)
            self.exchanges.append(Exchange(path, headers, body, fault))
            if self.settings.latency_s:
                await asyncio.sleep(self.settings.latency_s)
            if self.settings.redirect_to:
                writer.write(_response(307, b"", f"Location: {self.settings.redirect_to}"))
                return True
            if fault is None:
                writer.write(_response(*answer(path, body, self.settings.refused_status)))
                await writer.drain()
                return True
            return await self._misbehave(fault, path, body, writer)
        finally:
            self._num_open -= 1

    def _next_fault(self, body: bytes) -> str | None:
        if len(self.exchanges) < self.settings.num_storm:
            return "throttle"
        if self.settings.throttled_model and json.loads(body).get("model") == self.settings.throttled_model:
            return "throttle"
        key = _digest(body)
        if self._num_faults[key] >= self.settings.max_faults:
            return None
        number = self._random.random()
        for fault, chance in self.settings.faults.items():
            if number < chance:
                self._num_faults[key] += 1
                return fault
            number -= chance
        return None

    async def _misbehave(self, fault: str, path: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        status, content = answer(path, body, self.settings.refused_status)
        whole = _response(status, content)
        if fault == "hang":
            await asyncio.Event().wait()
        elif fault == "reset":
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        elif fault == "truncated":
            writer.write(whole[: len(whole) - len(content) // 2 - 1])
        elif fault == "slow":
            for position in range(len(whole)):
                writer.write(whole[position : position + 1])
                await writer.drain()
                await asyncio.sleep(self.settings.byte_interval_s)
        if fault in ("hang", "reset", "truncated", "slow", "closed"):
            return False
        writer.write(self._wrong_response(fault, content))
        await writer.drain()
        return True

    def _wrong_response(self, fault: str, content: bytes) -> bytes:
        if fault == "malformed":
            return _response(200, content[: len(content) // 2])
        if fault == "html":
            return _response(200, b"<html>It works!</html>", "Content-Type: text/html")
        if fault == "empty":
            return _response(200, b"")
        if fault == "busy":
            return _response(200, _error("injected: busy, try again", 503))
        if fault == "huge":
            return _response(200, b'{"choices": ["' + b"x" * self.settings.huge_bytes + b'"]}')
        status = {"error": 500, "unavailable": 503, "throttle": 429}[fault]
        retry_after = self.settings.retry_after
        if retry_after == "date":
            retry_after = formatdate(time.time() + 1, usegmt=True)
        extra = ("Content-Type: application/json", *((f"Retry-After: {retry_after}",) if fault == "throttle" else ()))
        return _response(status, _error(f"injected: {fault}", status), *extra)


_OTHER_ENDPOINTS = {
    "/v1/embeddings": "data",
    "/v1/responses": "output",
    "/v1/moderations": "results",
    "/v1/rerank": "results",
    "/v1/score": "data",
}


def answer(path: str, body: bytes, refused_status: int = 400) -> tuple[int, bytes]:
    """Status and content for one body: words that depend on it alone, `n` choices, and their usage."""
    try:
        request = json.loads(body)
    except ValueError:
        return 400, _error("no JSON", 400)
    path = path.partition("?")[0]
    if (other := path if path.startswith("/v1/") else f"/v1{path}") in _OTHER_ENDPOINTS:
        return 200, json.dumps(_other_answer(other, body)).encode()
    if path not in ("/v1/chat/completions", "/v1/completions"):
        return 404, _error(f"no endpoint {path}", 404)
    is_chat = path.endswith("chat/completions")
    prompt = request.get("messages" if is_chat else "prompt")
    if not prompt:
        return refused_status, _error("messages or prompt is missing", refused_status)
    digest = blake2b(body, digest_size=16)
    limit = request.get("max_completion_tokens") or request.get("max_tokens") or _DEFAULT_MAX_TOKENS
    num_choices = request.get("n") or 1
    if not _is_whole(limit) or not _is_whole(num_choices):
        return refused_status, _error("max_tokens and n must be whole numbers", refused_status)
    num_tokens = min(int(limit), 1 + digest.digest()[0] % _DEFAULT_MAX_TOKENS)
    choices = [_choice(index, is_chat, digest.digest(), num_tokens) for index in range(int(num_choices))]
    num_prompt = len(json.dumps(prompt)) // 4
    num_output = num_tokens * len(choices)
    return 200, json.dumps(
        {
            "id": f"fake-{digest.hexdigest()}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": 1_700_000_000,
            "model": request.get("model", "fake"),
            "choices": choices,
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_output,
                "total_tokens": num_prompt + num_output,
            },
        }
    ).encode()


def _is_whole(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _other_answer(path: str, body: bytes) -> dict[str, Any]:
    """One result, in the field in which such an endpoint has them, and what it counts."""
    result = {"index": 0, "id": blake2b(body, digest_size=16).hexdigest()}
    return {
        _OTHER_ENDPOINTS[path]: [result],
        "usage": {"prompt_tokens": len(body) // 4, "total_tokens": len(body) // 4},
    }


def _choice(index: int, is_chat: bool, digest: bytes, num_tokens: int) -> dict[str, Any]:
    source = random.Random(digest + bytes([index % 256]))
    text = " ".join(source.choice(_WORDS) for _ in range(num_tokens))
    content = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    return {"index": index, **content, "logprobs": None, "finish_reason": "stop"}


def _error(message: str, status: int) -> bytes:
    return json.dumps({"error": {"message": message, "type": "fake", "param": None, "code": f"fake_{status}"}}).encode()


def _digest(body: bytes) -> str:
    return blake2b(body, digest_size=16).hexdigest()


def _response(status: int, content: bytes, *headers: str) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Fault')}",
        *(headers or ("Content-Type: application/json",)),
        f"Content-Length: {len(content)}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + content


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes] | None:
    """Path, headers (names in lower case) and body; None at the end of the connection."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.rstrip().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return first.split(" ")[1], headers, body


@contextmanager
def serving(settings: FakeSettings | None = None, port: int = 0) -> Iterator[FakeServer]:
    """A server in a thread of its own, closed at the end."""
    server = FakeServer(settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fake-server", daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(port=port), loop).result()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def parse_faults(text: str) -> dict[str, float]:
    """Read "reset=0.1,throttle=0.2". Raises: ValueError naming what is wrong."""
    faults: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, chance = part.partition("=")
        if name not in FAULTS:
            raise ValueError(f"no fault {name!r}; there are {', '.join(FAULTS)}")
        faults[name] = float(chance or 1)
    if sum(faults.values()) > 1 + 1e-9:
        raise ValueError(f"the chances add up to {sum(faults.values()):g}; they must not exceed 1")
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m blendserve.engines.http.fake_server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one (8000)")
    parser.add_argument("--faults", type=parse_faults, default={}, metavar="NAME=CHANCE,...", help=", ".join(FAULTS))
    parser.add_argument("--max-faults", type=int, default=3, metavar="N", help="faults per request at most (3)")
    parser.add_argument("--storm", type=int, default=0, metavar="N", help="the first N tries get HTTP 429")
    parser.add_argument("--retry-after", default="1", metavar="VALUE", help='sent with HTTP 429; "date" for a date (1)')
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="before every response")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    settings = FakeSettings(
        faults=args.faults,
        seed=args.seed,
        max_faults=args.max_faults,
        num_storm=args.storm,
        retry_after=args.retry_after,
        latency_s=args.latency,
    )
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve_forever(FakeServer(settings), args.host, args.port))
    return 0


async def _serve_forever(server: FakeServer, host: str, port: int) -> None:
    await server.start(host, port)
    print(f"listening on {server.base_url}", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await server.close()


if __name__ == "__main__":
    sys.exit(main())

"""What clients send, with a few random changes by seed: it must be read, or refused as the client's fault."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

from serve_cases import lines, settings_for

from blendserve.serve.failures import ApiError
from blendserve.serve.multipart import read_form
from blendserve.serve.validation import validate_file

GOOD_FORM = (
    b'--b1\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b1\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\nContent-Type: text/plain\r\n\r\n'
    + lines(3)
    + b"\r\n--b1--\r\n"
)
GOOD_LINES = lines(4)
PIECES = (
    *(b"--b1", b"\r\n", b"--", b"\x00", b"\xff\xfe", b'"', b";", b"name=", b"Content-Disposition:", b"\r", b"b1--"),
    *(b"%", b"{", b"}", b"[" * 60, b"1e999", b"-0", b"NaN", b"null", b"\\ud800", b'"custom_id"', b'"body": ', b"\n"),
)


class MemoryWriter:
    """A blob in memory."""

    def __init__(self) -> None:
        self.data = b""
        self.num_lines = 0
        self.sha256 = ""

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    def write(self, data: bytes) -> None:
        self.data += data

    def commit(self) -> None:
        """Nothing to do."""

    abort = commit


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few random changes: bytes cut out, doubled, replaced, or pieces put in."""
    found = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(found) + 1)
        size = chance.choice((1, 1, 2, 8, 40))
        kind = chance.randrange(4)
        if kind == 0:
            del found[at : at + size]
        elif kind == 1:
            found[at:at] = found[at : at + size]
        elif kind == 2:
            found[at : at + size] = chance.randbytes(size)
        else:
            found[at:at] = chance.choice(PIECES)
    return bytes(found)


async def _chunks_of(data: bytes, chance: random.Random) -> AsyncIterator[bytes]:
    while data:
        size = chance.choice((1, 7, 100, 10_000))
        yield data[:size]
        data = data[size:]


def read_mutated_forms(count: int, seed: int) -> Counter[str]:
    """Returns: how many were read, and how many refused. Anything else is an exception."""
    chance, found = random.Random(seed), Counter[str]()

    async def read() -> str:
        data, writer = mutated(GOOD_FORM, chance), MemoryWriter()
        try:
            await read_form(_chunks_of(data, chance), b"b1", "file", writer, lambda _: None)
        except ApiError as error:
            if error.status_code != 400:
                raise
            return "forms refused"
        assert len(writer.data) <= len(data)
        return "forms read"

    async def read_all() -> None:
        for _ in range(count):
            found[await read()] += 1

    asyncio.run(read_all())
    return found


def validate_mutated_lines(directory: Path, count: int, seed: int) -> Counter[str]:
    """Returns: how many files were taken, and how many refused. Anything else is an exception."""
    chance, path, counts = random.Random(seed), directory / "in.jsonl", Counter[str]()
    settings = settings_for(directory / "data", "http://127.0.0.1:9/v1")
    for _ in range(count):
        path.write_bytes(mutated(GOOD_LINES, chance))
        found = validate_file(path, "/v1/chat/completions", settings)
        assert (found.model is None) == bool(found.errors)
        json.dumps(found.errors, ensure_ascii=False).encode()
        counts["files refused" if found.errors else "files taken"] += 1
    return counts

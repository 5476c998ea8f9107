"""The hostile set: whatever a file holds, each line is one line or one numbered error, and memory stays bounded."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import SERVED, batch_line, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blendserve.dialect.schema import BatchLine, ServedModel
from blendserve.errors import ConfigError, RequestError
from blendserve.job.input_file import sha256_of
from blendserve.job.json_lines import MAX_LINE_PARTS, parse_json
from blendserve.job.reader import BadLine, BatchReader, ReadLimits

GOOD = [batch_line(f"id-{number}") for number in range(3)]


def outline(path: Path, max_line_bytes: int = 1 << 20) -> list[tuple[int, str | None]]:
    """Every line as (number, custom_id or error code)."""
    return [_outline(line) for line in BatchReader(path, SERVED, ReadLimits(max_line_bytes))]


def _outline(line: BatchLine | BadLine) -> tuple[int, str | None]:
    return line.line_number, line.error.code if isinstance(line, BadLine) else line.custom_id


def valid(*numbers: int) -> list[tuple[int, str]]:
    return [(number, f"id-{index}") for index, number in enumerate(numbers)]


def as_bytes(*separators: bytes) -> bytes:
    return b"".join(json.dumps(line).encode() + separator for line, separator in zip(GOOD, separators, strict=True))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (as_bytes(b"\n", b"\n", b"\n"), valid(1, 2, 3)),
        (as_bytes(b"\n", b"\n", b""), valid(1, 2, 3)),
        (as_bytes(b"\r\n", b"\r\n", b"\r\n"), valid(1, 2, 3)),
        (b"\xef\xbb\xbf" + as_bytes(b"\n", b"\n", b"\n"), valid(1, 2, 3)),
        (b"\n  \n" + as_bytes(b"\n\n", b"\n \t\r\n", b"\n\n\n"), valid(3, 5, 7)),
    ],
    ids=["plain", "no final newline", "crlf", "bom", "blank lines"],
)
def test_line_ends_and_marks(tmp_path: Path, content: bytes, expected: list[tuple[int, str]]) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    assert outline(path) == expected


HOSTILE = {
    "not json": b"{nope",
    "half a line": json.dumps(GOOD[0]).encode()[:40],
    "two values": b"{} {}",
    "invalid utf-8": b'{"custom_id": "\xff\xfe"}',
    "nul bytes": b"\x00\x00\x00",
    "nan": b'{"custom_id": "a", "body": {"temperature": NaN}}',
    "minus infinity": b'{"custom_id": -Infinity}',
    "duplicate keys": b'{"custom_id": "a", "custom_id": "b"}',
    "duplicate keys inside": b'{"custom_id": "a", "body": {"seed": 1, "seed": 2}}',
    "lone surrogate": b'{"custom_id": "\\ud800"}',
    "lone surrogate in capitals": b'{"custom_id": "a", "body": {"prompt": "x\\uDFFFy"}}',
    "deep arrays": b"[" * 200_000,
    "deep closed arrays": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "huge integer": b'{"custom_id": ' + b"9" * 10_000 + b"}",
    "no object": b"[1, 2]",
    "a string": b'"custom_id"',
    "csv": b"custom_id,prompt",
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_line_is_one_error_and_harms_no_neighbour(tmp_path: Path, hostile: bytes) -> None:
    path = write_lines(tmp_path / "in.jsonl", [GOOD[0], hostile, GOOD[1]])
    assert outline(path) == [(1, "id-0"), (2, "invalid_json_line"), (3, "id-1")]


def test_what_strictness_must_not_refuse() -> None:
    text = {"a": "\U0001f600 \ud7ff \ue000 \u0000 \u2028", "b": 1e308, "c": -0.0, "d": 10**18}
    assert parse_json(json.dumps(text).encode()) == text
    assert parse_json(json.dumps(text, ensure_ascii=False).encode()) == text
    assert parse_json(rb'{"path": "C:\\udata\\ud"}') == {"path": r"C:\udata\ud"}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_any_bytes_parse_or_raise_a_request_error(content: bytes) -> None:
    try:
        parse_json(content)
    except RequestError as error:
        codes = {error.code}
    else:
        codes = set()
    assert codes <= {"invalid_json_line"}


def test_duplicates_of_valid_and_of_bad_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [GOOD[0], GOOD[0], batch_line("x", method="GET"), batch_line("x")])
    duplicate = "duplicate_custom_id"
    assert outline(path) == [(1, "id-0"), (2, duplicate), (3, "invalid_method"), (4, duplicate)]
    bad = [line for line in BatchReader(path, SERVED) if isinstance(line, BadLine)]
    assert [line.custom_id for line in bad] == ["id-0", "x", "x"]


def test_a_line_over_the_limit_is_one_error_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(GOOD[0]).encode() + b'\n{"custom_id": "')
        for _ in range(50):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + json.dumps(GOOD[1]).encode() + b"\n" + b"y" * (3 << 20))
    tracemalloc.start()
    assert outline(path) == [(1, "id-0"), (2, "line_too_long"), (3, "id-1"), (4, "line_too_long")]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 12 << 20


def test_the_limit_is_exact(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [GOOD[0], GOOD[1]])
    length = len(json.dumps(GOOD[0]))
    assert outline(path, max_line_bytes=length) == valid(1, 2)
    assert outline(path, max_line_bytes=length - 1) == [(1, "line_too_long"), (2, "line_too_long")]


def test_a_line_of_many_megabytes_within_the_limit_is_served(tmp_path: Path) -> None:
    long = batch_line("long", {"prompt": "word " * (1 << 20)})
    assert outline(write_lines(tmp_path / "in.jsonl", [long]), max_line_bytes=8 << 20) == [(1, "long")]


def test_one_file_one_model(tmp_path: Path) -> None:
    def lines(*models: str | None) -> Path:
        numbered = enumerate(models)
        return write_lines(
            tmp_path / "in.jsonl",
            [batch_line(f"id-{index}", {"prompt": "x", "model": model}) for index, model in numbered],
        )

    assert outline(lines("tiny", "models/tiny", None, "tiny")) == valid(1, 2, 3, 4)
    chosen = ServedModel(("tiny",), accepts_any_name=True)
    reader = BatchReader(lines(None, "gpt-4o", "tiny", "gpt-4o"), chosen)
    assert [_outline(line) for line in reader] == [(1, "id-0"), (2, "id-1"), (3, "mismatched_model"), (4, "id-3")]
    assert reader.requested_model == "gpt-4o"


def test_gzip_is_recognised_by_content(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + as_bytes(b"\n", b"\n", b"")))
    assert outline(path) == valid(1, 2, 3)
    path.write_bytes(
        gzip.compress(as_bytes(b"\n", b"\n", b"\n")[:30]) + gzip.compress(as_bytes(b"\n", b"\n", b"\n")[30:])
    )
    assert outline(path) == valid(1, 2, 3)


@pytest.mark.parametrize("lost_bytes", [1, 8, 9, 60, 4000])
def test_a_truncated_gzip_serves_its_whole_lines_and_says_where_it_ends(tmp_path: Path, lost_bytes: int) -> None:
    lines = [batch_line(f"id-{number}", {"prompt": os.urandom(20).hex()}) for number in range(500)]
    whole = gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(whole[:-lost_bytes])
    found = outline(path)
    assert found[-1] == (len(found), "truncated_input")
    assert found[:-1] == valid(*range(1, len(found)))
    assert len(found) > (500 if lost_bytes < 9 else 200)


def test_a_corrupt_gzip_is_an_error_row_and_is_hashed_to_its_end(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(os.urandom(4 << 20).hex().encode(), 1))
    content[1 << 20 : (1 << 20) + 64] = b"\xff" * 64
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(content)
    reader = BatchReader(path, SERVED, ReadLimits(max_line_bytes=1 << 16))
    codes = [line.error.code for line in reader if isinstance(line, BadLine)]
    assert codes[-1] == "truncated_input"
    assert reader.sha256 == hashlib.sha256(content).hexdigest() == sha256_of(path)


def test_what_follows_a_gzip_stream_is_one_error_row_and_hashed_too(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(as_bytes(b"\n", b"\n", b"\n")) + b"garbage" + os.urandom(3 << 20))
    reader = BatchReader(path, SERVED)
    assert [_outline(line) for line in reader] == [*valid(1, 2, 3), (4, "truncated_input")]
    assert reader.sha256 == sha256_of(path)


def test_the_hash_is_of_the_stored_bytes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [*GOOD, b"", b"{bad"])
    reader = BatchReader(path, SERVED)
    assert len(list(reader)) == reader.num_lines == 4
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)


def test_files_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    utf16 = tmp_path / "utf16"
    utf16.write_text("{}", encoding="utf-16")
    wrong = {
        tmp_path: "directory",
        tmp_path / "missing": "No such file",
        fifo: "regular file",
        utf16: "UTF-16",
        Path("-"): "standard input",
    }
    for path, words in wrong.items():
        with pytest.raises(ConfigError, match=words):
            list(BatchReader(path, SERVED))


@pytest.mark.parametrize("is_remote", [False, True], ids=["answered here", "remote"])
def test_json_at_any_depth_is_a_line_or_a_row(is_remote: bool, tmp_path: Path) -> None:
    """Deep enough to parse may be too deep to quote in a message or to write again."""
    lines = []
    for depth in range(700, 1000):
        body = '{"messages": [{"role": "user", "content": "hi"}], "temperature": ' + "[" * depth + "]" * depth + "}"
        lines.append(f'{{"custom_id": "{depth}", "method": "POST", "url": "/v1/chat/completions", "body": {body}}}\n')
    path = tmp_path / "in.jsonl"
    path.write_text("".join(lines))
    read = list(BatchReader(path, ServedModel(("tiny",), is_remote=is_remote)))
    assert [line.line_number for line in read] == list(range(1, len(lines) + 1))
    assert isinstance(read[-1], BadLine)
    assert read[-1].error.code == "invalid_json_line"


def test_a_line_that_asks_for_too_many_answers_is_its_own_error(tmp_path: Path) -> None:
    lines = [batch_line("fits", {"prompt": ["a"] * 3, "n": 2}), batch_line("long", {"prompt": ["a"] * 7})]
    read = list(BatchReader(write_lines(tmp_path / "in.jsonl", lines), SERVED, ReadLimits(max_line_requests=6)))
    assert [_outline(line) for line in read] == [(1, "fits"), (2, "too_many_requests")]
    assert isinstance(read[1], BadLine)
    assert "asks for 7 answers" in read[1].error.message
    assert "--max-line-requests" in read[1].error.message


@pytest.mark.parametrize("line", [batch_line("a", {"prompt": "a", "n": 4}), "no json"])
def test_a_file_that_asks_for_too_many_answers_is_refused(tmp_path: Path, line: Any) -> None:
    path = write_lines(tmp_path / "in.jsonl", [*(batch_line(str(number)) for number in range(6)), *([line] * 4)])
    assert len(list(BatchReader(path, SERVED, ReadLimits(max_requests=13)))) == 10
    with pytest.raises(ConfigError, match=r"more than 9 answers up to line [78910]+; .*--max-requests"):
        list(BatchReader(path, SERVED, ReadLimits(max_requests=9)))


@pytest.mark.parametrize(
    ("value", "is_read"),
    [
        ("[" + "[]," * MAX_LINE_PARTS + "[]]", False),
        ("{" + ",".join(f'"{number}":0' for number in range(MAX_LINE_PARTS)) + "}", False),
        ("[" + "0," * MAX_LINE_PARTS + "0]", True),
        ('"' + '\\"[{:' * MAX_LINE_PARTS + '"', True),
    ],
    ids=["lists", "members", "numbers", "text"],
)
def test_a_line_of_many_small_parts_is_refused_unparsed(value: str, is_read: bool) -> None:
    line = f'{{"a":{value}}}'.encode()
    if is_read:
        assert parse_json(line) == json.loads(line)
    else:
        with pytest.raises(RequestError, match=f"more than {MAX_LINE_PARTS} objects, lists and members"):
            parse_json(line)

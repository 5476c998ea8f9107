"""What files that are no plain JSON lines become: unpacked, taken apart, or refused as a whole with one message."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import SERVED, batch_line, read_rows, run_fake, write_lines

from blendserve.dialect.schema import BatchLine, ServedModel
from blendserve.errors import ConfigError
from blendserve.job.foreign import MAX_LINES_BEFORE_VERDICT
from blendserve.job.input_file import sha256_of
from blendserve.job.reader import BadLine, BatchReader, ReadLimits

LINES = [batch_line(f"id-{number}", {"prompt": random.Random(number).randbytes(20).hex()}) for number in range(300)]
PLAIN = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)


def packed_zstd(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed: pip install zstandard")
    packed: bytes = zstandard.ZstdCompressor().compress(content)
    return packed


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": packed_zstd,
}


def read(path: Path, served: ServedModel = SERVED) -> list[tuple[int, str | None]]:
    return [
        (line.line_number, line.error.code if isinstance(line, BadLine) else line.custom_id)
        for line in BatchReader(path, served)
    ]


def reason(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as refused:
        list(BatchReader(path, SERVED))
    return str(refused.value)


@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED)
def test_every_compression_is_recognised_by_content(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(pack(PLAIN))
    reader = BatchReader(path, SERVED)
    assert [line.custom_id for line in reader] == [line["custom_id"] for line in LINES]
    assert reader.sha256 == sha256_of(path)
    path.write_bytes(pack(PLAIN[:3000]) + pack(PLAIN[3000:]))  # two streams in one file
    assert len(read(path)) == len(LINES)


@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED)
def test_a_cut_file_serves_its_whole_lines_and_says_where_it_ends(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(pack(PLAIN)[:-7])
    found = read(path)
    assert found[-1] == (len(found), "truncated_input")
    assert [custom_id for _, custom_id in found[:-1]] == [line["custom_id"] for line in LINES[: len(found) - 1]]


@pytest.mark.parametrize("name", PACKED)
def test_damaged_bytes_never_end_a_read_with_another_error(tmp_path: Path, name: str) -> None:
    source, packed = random.Random(3), PACKED[name](PLAIN)
    for _ in range(60):
        damaged = bytearray(packed)
        for _ in range(source.randrange(1, 4)):
            damaged[source.randrange(12, len(damaged))] ^= 1 << source.randrange(8)
        path = tmp_path / "in.jsonl"
        path.write_bytes(damaged)
        for line in BatchReader(path, SERVED, ReadLimits(max_line_bytes=1 << 16)):
            assert isinstance(line, BadLine | BatchLine)


def test_a_missing_unpacker_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_zstd(PLAIN)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setattr(sys, "version_info", (3, 13))
    assert "pip install zstandard" in reason(tmp_path / "in.jsonl.zst", packed)


def test_zstd_is_unpacked_in_bounded_pieces(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(packed_zstd(json.dumps(LINES[0]).encode() + b"\n" + b" " * (160 << 20)))
    tracemalloc.start()
    first, second = BatchReader(path, SERVED, ReadLimits(max_line_bytes=1 << 16))
    assert (first.custom_id, second.custom_id) == ("id-0", None)
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


ARRAY = json.dumps(LINES[:3])
FOREIGN: dict[str, tuple[bytes | str, str]] = {
    "an array": (ARRAY, r"is one JSON array, not JSON lines; convert it: jq -c '\.\[\]' "),
    "a pretty array": (json.dumps(LINES[:3], indent=2), r"is one JSON array"),
    "pretty objects": ("\n".join(json.dumps(line, indent=2) for line in LINES[:3]), r"spread over several lines.*jq"),
    "csv": (
        "id,prompt\n1,Name a colour\n",
        r"is a table \(CSV\) with 2 columns; answer its rows with `blendserve map`, or write",
    ),
    "tsv": ("id\tprompt\n1\tName a colour\n", r"is a table"),
    "text": ("Name a colour.\nName a city.\n", r"is plain text, not JSON; write each line as \{"),
    "python": ("{'custom_id': 'a', 'method': 'POST'}\n" * 2, r"Python's notation.*json\.dumps"),
    "markup": ("<html>\n<body>", "HTML or XML"),
    "utf-16 with a mark": (
        PLAIN.decode().encode("utf-16"),
        "is UTF-16 text; convert it first: iconv -f utf-16 -t",
    ),
    "utf-16 without": (PLAIN.decode().encode("utf-16-le"), "is UTF-16LE text.*iconv -f utf-16le"),
    "big-endian": (PLAIN.decode().encode("utf-16-be"), "is UTF-16BE text"),
    "utf-32": (PLAIN.decode().encode("utf-32"), "is UTF-32 text"),
    "utf-16 in gzip": (gzip.compress(PLAIN.decode().encode("utf-16")), "is UTF-16 text"),
    "parquet": (b"PAR1\x15\x04", "is a Parquet file"),
    "arrow": (b"ARROW1\x00\x00", "is an Arrow file"),
    "zip": (b"PK\x03\x04....", "is a zip archive"),
    "anthropic": ('{"custom_id": "a", "params": {"model": "claude", "messages": []}}', "Anthropic's format"),
    "gemini": ('{"key": "a", "request": {"contents": []}}', "Gemini's batch format"),
    "vertex": ('{"request": {"contents": []}}', "Gemini's batch format"),
    "bedrock": ('{"recordId": "a", "modelInput": {}}', "Bedrock's batch format"),
    "mistral": ('{"custom_id": "a", "body": {"messages": []}}', r"Mistral's batch format.*jq -c '\. \+ \{method"),
    "prompts": ('{"prompt": "Name a colour."}\n{"prompt": "b"}', "holds bare prompts; convert it: jq"),
    "chats": ('{"messages": [{"role": "user", "content": "hi"}]}', "holds bare chats"),
    "flat": ('{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "messages": []}', "move them into"),
    "rows": ('{"id": "b", "custom_id": "a", "response": {}, "error": null}', "holds a batch's answers"),
    "training data": ('{"instruction": "Do it", "input": "", "output": ""}', "holds training data"),
    "texts": ('{"text": "a text"}', "holds bare texts"),
    "strings": ('"Name a colour."\n"Name a city."\n', r"holds bare texts \(JSON strings\)"),
    "sharegpt": ('{"conversations": [{"from": "human", "value": "hi"}]}', "ShareGPT's format"),
    "questions": ('{"question": "x", "answer": "y"}\n{"question": "z"}', "have neither custom_id nor body; write each"),
    "an object around requests": (json.dumps({"requests": LINES[:3]}), r"jq -c '\.requests\[\]'"),
    "an object around Anthropic's": ('{"requests": [{"custom_id": "a", "params": {}}]}', "Anthropic's format"),
    "commas": (",\n".join(map(json.dumps, LINES[:3])) + ",\n", "has a comma behind its lines.*sed 's/,"),
    "javascript": ("{custom_id: 'a', method: 'POST'}", "JavaScript's notation.*JSON.stringify"),
    "a sequence": ("".join(f"\x1e{json.dumps(line)}\n" for line in LINES[:3]), "JSON text sequence.*tr -d"),
    "latin-1": ('{"custom_id": "a", "body": {"prompt": "caf\xe9"}}\n'.encode("latin-1") * 3, "not UTF-8.*iconv -f"),
    "shift-jis": ("色の名前\n都市\n".encode("shift_jis"), "not UTF-8"),
    "csv in quotes": ('"id","prompt"\n"1","Name, please"\n', "is a table"),
    "a csv that Python's reader refuses": (b"a\r\x00,b\rc\n\x00", "is binary data"),
    "gzip in gzip": (gzip.compress(gzip.compress(PLAIN)), "compressed twice"),
    "lzma": (lzma.compress(PLAIN, format=lzma.FORMAT_ALONE), "compressed with LZMA"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00", "is a picture"),
    "bytes": (bytes(range(128, 256)) + bytes(range(32)), "is binary data"),
    "git lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "tar": (b"in.jsonl".ljust(257, b"\x00") + b"ustar\x0000" + bytes(300), "is a tar archive; unpack it first"),
    "tar in gzip": (gzip.compress(b"in.jsonl".ljust(257, b"\x00") + b"ustar  \x00" + bytes(300)), "is a tar archive"),
}


@pytest.mark.parametrize(("content", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_format_is_one_error(tmp_path: Path, content: bytes | str, message: str) -> None:
    path = tmp_path / "my file.jsonl"
    found = reason(path, content)
    assert found.startswith(f"{path} ")
    assert re.search(message, found), found
    with pytest.raises(ConfigError, match="my file"):
        run_fake(path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "out.errors.jsonl").exists()


_CONVERTED = ("an array", "pretty objects", "prompts", "chats", "commas", "a sequence", "an object around requests")


def test_the_command_of_a_message_converts_the_file(tmp_path: Path) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    for number, (content, _) in enumerate(FOREIGN[name] for name in _CONVERTED):
        found = reason(tmp_path / f"{number}.jsonl", content)
        subprocess.run(re.split("; (?:convert it|remove .*?): ", found)[1], shell=True, check=True, cwd=tmp_path)
        lines = list(BatchReader(tmp_path / "batch.jsonl", SERVED))
        assert lines
        assert all(isinstance(line, BatchLine) for line in lines)


def test_a_file_of_another_format_is_refused_before_its_end(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "x"}\n' * (MAX_LINES_BEFORE_VERDICT + 5) + json.dumps(LINES[0]) + "\n")
    with pytest.raises(ConfigError, match="bare prompts"):
        list(BatchReader(path, SERVED))


def test_one_line_of_ours_makes_the_others_rows(tmp_path: Path) -> None:
    lines: list[Any] = ['{"prompt": "x"}', "a text", '{"recordId": "a", "modelInput": {}}', LINES[0]]
    path = write_lines(tmp_path / "in.jsonl", lines)
    assert read(path) == [(1, "unknown_format"), (2, "invalid_json_line"), (3, "unknown_format"), (4, "id-0")]
    run_fake(path, tmp_path / "out.jsonl")
    messages = [row["error"]["message"] for row in read_rows(tmp_path / "out.errors.jsonl")]
    assert any("line 3: the line is in Bedrock's batch format" in message for message in messages)


def test_several_other_formats_are_rows_that_name_them(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", ['{"prompt": "x"}', '{"key": "v", "request": {"contents": []}}'])
    assert [code for _, code in read(path)] == ["unknown_format", "unknown_format"]


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("separator", [b"", MARK, b" ", b"\t" + MARK + b" "], ids=["nothing", "mark", "blank", "both"])
def test_files_that_were_joined_without_a_line_break_are_taken(tmp_path: Path, separator: bytes) -> None:
    path = tmp_path / "in.jsonl"
    texts = [json.dumps(line).encode() for line in LINES[:4]]
    path.write_bytes(MARK + texts[0] + separator + texts[1] + b"\n" + MARK + texts[2] + b"\n" + texts[3])
    assert read(path) == [(1, "id-0"), (2, "id-1"), (3, "id-2"), (4, "id-3")]


def test_text_that_looks_like_joined_objects_is_left_alone(tmp_path: Path) -> None:
    tricky = batch_line("a", {"prompt": '}{"custom_id": "b"}{"custom_id": "c"'})
    assert read(write_lines(tmp_path / "in.jsonl", [tricky, b'{"custom_id": "x"} {}'])) == [
        (1, "a"),
        (2, "invalid_json_line"),
    ]


@pytest.mark.parametrize(
    ("line", "custom_id"),
    [
        (b'{"custom_id": "nan", "body": {"temperature": NaN}}', "nan"),
        (b'{"custom_id": "twice", "body": {"seed": 1, "seed": 2}}', "twice"),
        (b'{"custom_id": "half", "body": {"prompt": "\\ud800"}}', "half"),
        (b'{"custom_id": "cut", "method": "POST", "url": "/v1/chat', "cut"),
        (b'{"custom_id": "a \\"quoted\\" id", "method"', 'a "quoted" id'),
        (b'{"custom_id": "\\ud800x", "body": {}}', "?x"),
        (b'{"custom_id": 7, "body": {}}', "7"),
        (b'{"custom_id": 7, "body": {"x": NaN}}', "7"),
        (b'{"custom_id": "", "method": "POST"}', ""),
        (b'{"custom_id": ["a"], "method": "POST"}', None),
        (b'{"custom_id": true, "method": "POST"}', None),
        (b"not json", None),
        (b'{"custom_id": "' + os.urandom(40).hex().encode() * 20_000, None),
    ],
)
def test_error_rows_have_the_id_wherever_it_can_be_read(tmp_path: Path, line: bytes, custom_id: str | None) -> None:
    path = write_lines(tmp_path / "in.jsonl", [line, LINES[0]])
    bad, good = BatchReader(path, SERVED)
    assert (bad.custom_id, good.custom_id) == (custom_id, "id-0")
    assert isinstance(bad, BadLine)


def test_an_empty_id_has_a_message_of_its_own(tmp_path: Path) -> None:
    (bad,) = BatchReader(write_lines(tmp_path / "in.jsonl", [batch_line("")]), SERVED)
    assert isinstance(bad, BadLine)
    assert bad.error.message.startswith("custom_id is an empty string")


def test_several_faults_of_a_line_are_told_at_once(tmp_path: Path) -> None:
    def error_of(line: dict[str, Any]) -> Any:
        (bad,) = BatchReader(write_lines(tmp_path / "in.jsonl", [line]), SERVED)
        assert isinstance(bad, BadLine)
        return bad.error

    error = error_of(batch_line("a", {"prompt": "x", "temperature": "hot", "top_p": 7, "bogus": 1}))
    assert error.code in ("invalid_type", "unknown_parameter")
    for words in ("temperature is 'hot'", "; also: ", "top_p is 7", "unknown parameter 'bogus'"):
        assert words in error.message
    outside = error_of(batch_line(3, {"prompt": "x", "temperature": "hot"}, method="GET"))
    assert outside.message.startswith("custom_id is 3; it must be a string")
    assert "also: method is 'GET'" in outside.message
    assert "also: temperature is 'hot'" in outside.message
    assert "also" not in error_of(batch_line("a", {"prompt": "x", "temperature": "hot"})).message
    tool = {"type": "function", "function": {"name": "f"}}
    asks = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "tool_choice": "required"}
    assert (
        "also" not in error_of(batch_line("a", asks, url="/v1/chat/completions")).message
    )  # not that there are no tools


def test_a_file_that_asks_for_models_that_are_not_here(tmp_path: Path) -> None:
    def lines(*models: str) -> Path:
        numbered = enumerate(models)
        return write_lines(
            tmp_path / "in.jsonl", [batch_line(f"{at}", {"prompt": "x", "model": name}) for at, name in numbered]
        )

    with pytest.raises(ConfigError) as refused:
        run_fake(lines("gpt-4o-mini", "gpt-4o-mini"), tmp_path / "out.jsonl")
    assert str(refused.value) == (
        f"{tmp_path}/in.jsonl asks for the model 'gpt-4o-mini' (2 lines, the first is line 1), and the model here is "
        "tiny; nothing was run. Choose with --model which model answers these lines, such as --model tiny"
    )
    with pytest.raises(ConfigError, match=r"models 'a' \(1 line, the first is line 2\), 'b' .*split the file by model"):
        run_fake(lines("tiny", "a", "b", "a2", "a3", "a4", "a5"), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    chosen = ServedModel(("tiny",), accepts_any_name=True)
    assert run_fake(lines("gpt-4o-mini", "gpt-4o-mini"), tmp_path / "out.jsonl", served=chosen).exit_code == 0

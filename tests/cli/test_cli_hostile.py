"""The hostile set in one file through the real command: every bad line is one error row with its code and number, and
no good line is lost."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_files import tiny_directory

from blendserve.cli import main

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def line(custom_id: Any, body: Any = CHAT, **fields: Any) -> bytes:
    """A line as OpenAI has it; a field given as `...` is left out."""
    if isinstance(body, dict):
        body = {"model": "tiny", "max_tokens": 3, **body}
    content = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **fields}
    return json.dumps({name: value for name, value in content.items() if value is not ...}).encode()


GOOD = {
    "good": line("good"),
    "carriage return": line("carriage return") + b"\r",
    "max_tokens huge": line("max_tokens huge", {**CHAT, "max_tokens": 10**9, "stop": ["a", "e", " ", "t"]}),
    "unicode": line("unicode", {"messages": [{"role": "user", "content": "日本語 \U0001f600 \u2028 \x00"}]}),
    "spaces around": b"  \t" + line("spaces around") + b"  ",
    "name of another kind \u2028": line("name of another kind \u2028"),
    "a megabyte of name" + "x" * 2**20: line("a megabyte of name" + "x" * 2**20),
}
BLANK = (b"", b"   ", b"\t\r")
BAD: dict[str, tuple[bytes, str]] = {
    "invalid utf-8": (b'{"custom_id": "\xff\xfe"}', "invalid_json_line"),
    "50 MB line": (line("50 MB", {"messages": [{"role": "user", "content": "x" * (50 << 20)}]}), "line_too_long"),
    "deeply nested": (
        line("deep", {"messages": "@"}).replace(b'"@"', b"[" * 10**5 + b"]" * 10**5),
        "invalid_json_line",
    ),
    "nan": (line("nan", {**CHAT, "temperature": float("nan")}), "invalid_json_line"),
    "no json": (b"{custom_id: a}", "invalid_json_line"),
    "duplicate id": (line("good"), "duplicate_custom_id"),
    "no custom_id": (line(...), "missing_required_parameter"),
    "custom_id a number": (line(7), "invalid_custom_id"),
    "no body": (line("no body", ...), "missing_required_parameter"),
    "body a list": (line("body a list", []), "missing_required_parameter"),
    "no method": (line("no method", method=...), "invalid_method"),
    "wrong method": (line("wrong method", method="GET"), "invalid_method"),
    "unsupported url": (line("unsupported url", url="/v1/moderations"), "invalid_url"),
    "mixed models": (line("mixed models", {**CHAT, "model": "other"}), "mismatched_model"),
    "temperature a text": (line("temperature", {**CHAT, "temperature": "hot"}), "invalid_type"),
    "prompt too long": (
        line("long", {"messages": [{"role": "user", "content": "x " * 2000}]}),
        "context_length_exceeded",
    ),
    "max_tokens below 0": (line("max_tokens below 0", {**CHAT, "max_tokens": -1}), "invalid_value"),
    "empty messages": (line("empty messages", {"messages": []}), "invalid_type"),
    "tools": (line("tools", {**CHAT, "tools": [{}]}), "invalid_type"),
    "response_format": (line("format", {**CHAT, "response_format": {"type": "xml"}}), "invalid_value"),
    "schema": (line("schema", {**CHAT, "structured_outputs": {"json": {"not": {}}}}), "unsupported_schema"),
    "grammar": (line("grammar", {**CHAT, "guided_regex": "(a"}), "invalid_grammar"),
    "stream": (line("stream", {**CHAT, "stream": True}), "unsupported_parameter"),
    "image": (
        line("image", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        "unsupported_parameter",
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


def hostile_file() -> tuple[bytes, dict[int, str]]:
    """A file with a mark, bad lines and blank ones among good ones, and no newline at its end; the codes expected by
    line number."""
    good, bad = list(GOOD.values()), list(BAD.values())
    lines: list[bytes] = [good[0]]
    code_by_line = {}
    for number, (content, code) in enumerate(bad):
        lines += [content, BLANK[number % len(BLANK)]]
        code_by_line[len(lines) - 1] = code
        lines += good[1 + number : 2 + number]
    return b"\xef\xbb\xbf" + b"\n".join([*lines, line("last, without a newline")]), code_by_line


@pytest.mark.parametrize("is_gzip", [False, True], ids=["plain", "gzip"])
def test_the_hostile_set(is_gzip: bool, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, code_by_line = hostile_file()
    source, output = tmp_path / ("in.jsonl.gz" if is_gzip else "in.jsonl"), tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(content, 1) if is_gzip else content)
    assert main(["check", str(source), "--model", str(tiny), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    listed = {number: code for code, found in report["errors"].items() for number in found["line_numbers"]}
    assert listed == code_by_line
    limits = ["--kv-memory", "4MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--threads", "2"]
    assert main(["run", str(source), "-o", str(output), "--model", str(tiny), "--json", *limits]) == 3
    summary = json.loads(capsys.readouterr().out)
    answers = [json.loads(row) for row in output.read_bytes().splitlines()]
    assert sorted(row["custom_id"] for row in answers) == sorted([*GOOD, "last, without a newline"])
    errors = [json.loads(row) for row in (tmp_path / "out.errors.jsonl").read_bytes().splitlines()]
    assert len(errors) == summary["num_lines"] - len(answers) == len(code_by_line)
    found = {}
    for row in errors:
        error = row["error"] or row["response"]["body"]["error"]
        number = int(error["message"].removeprefix("line ").split(":")[0])
        found[number] = error["code"]
        assert len(json.dumps(row)) < 2000, "an error row quotes no more than a little of its line"
    assert found == code_by_line


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"], ids=["empty", "blank", "mark"])
def test_every_command_says_the_same_of_an_empty_file(
    content: bytes, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(content)
    message = f"blendserve: {source} is empty: a batch file has one request in each line\n"
    for command in (["run", "-o", str(output)], ["check"], ["plan", "--hardware", "a100-80g"]):
        assert main([*command, str(source), "--model", str(tiny)]) == 1
        assert capsys.readouterr().err == message
    assert not output.exists()

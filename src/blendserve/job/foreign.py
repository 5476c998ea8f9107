"""Files that are no batch file: which format they have, and what to do about it.

A line that is JSON of another kind gets a message of its own; a file without one line of our kind gets one error.
"""

from __future__ import annotations

import csv
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FRAME = '{"custom_id": "...", "method": "POST", "url": "/v1/chat/completions", "body": {...}}'
MAX_LINES_BEFORE_VERDICT = 1000
"""Lines of other formats, and none of ours, after which a file is refused without reading the rest."""
_FRAME_FIELDS = frozenset(("custom_id", "method", "url", "body"))
_HEAD_LINES = 4
_HEAD_BYTES = 4096


_CONTROLS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_UNQUOTED = re.compile(r"\{\s*[A-Za-z_]\w*\s*:")


class Format(NamedTuple):
    """A kind of line or file: a phrase that says what it is, and what to do. IN stands for the file's name."""

    phrase: str
    remedy: str


def _jq(program: str, option: str = "-c") -> str:
    return f"convert it: jq {option} '{program}' IN > batch.jsonl"


def _framed(url: str) -> str:
    """Puts every body into a frame with its number as custom_id."""
    frame = f'{{custom_id: tostring, method: "POST", url: "{url}", body: $body}}'
    return _jq(f"foreach inputs as $body (0; . + 1; {frame})", "-nc")


_AS_FRAME = f"write each line as {FRAME}"

ANTHROPIC = Format("is in Anthropic's format for message batches (custom_id and params)", _AS_FRAME)
GEMINI = Format("is in Gemini's batch format (a request with contents)", _AS_FRAME)
BEDROCK = Format("is in Bedrock's batch format (recordId and modelInput)", _AS_FRAME)
MISTRAL = Format(
    "is in Mistral's batch format (custom_id and body, without method and url)",
    _jq('. + {method: "POST", url: "/v1/chat/completions"}'),
)
FLAT = Format("has its parameters beside custom_id, and no body", f"move them into the body: {FRAME}")
OUTPUT_ROWS = Format("holds a batch's answers, not its questions", "give the file that was answered")
PROMPTS = Format("holds bare prompts", _framed("/v1/completions"))
CHATS = Format("holds bare chats (messages)", _framed("/v1/chat/completions"))
INSTRUCTIONS = Format("holds training data (instruction, input, output)", _AS_FRAME)
TEXTS = Format("holds bare texts (text)", _AS_FRAME)
SHAREGPT = Format("holds conversations in ShareGPT's format (conversations)", _AS_FRAME)
WRAPPED = Format("is one JSON object with its requests in a list", _jq(".requests[]"))
OTHER = Format("holds no requests: its lines have neither custom_id nor body", _AS_FRAME)

ARRAY = Format("is one JSON array, not JSON lines", _jq(".[]"))
PRETTY = Format("is JSON that is spread over several lines", _jq("."))
PYTHON = Format("is in Python's notation, not JSON", "write it with json.dumps, one request in each line")
JAVASCRIPT = Format(
    "is in JavaScript's notation, not JSON (names without quotation marks)",
    "write it with JSON.stringify, one request in each line",
)
COMMAS = Format(
    "has a comma behind its lines, as in an array", "remove them: sed 's/,[[:space:]]*$//' IN > batch.jsonl"
)
SEQUENCE = Format("is a JSON text sequence", "remove its separators: tr -d '\\036' < IN > batch.jsonl")
STRINGS = Format("holds bare texts (JSON strings)", _AS_FRAME)
MARKUP = Format("is HTML or XML", _AS_FRAME)
BINARY = Format("is binary data, not text", _AS_FRAME)
ENCODED = Format(
    "is text, but not UTF-8", "convert it, here from Windows-1252: iconv -f windows-1252 -t utf-8 IN > batch.jsonl"
)
TABLE = Format(
    "is a table (CSV) with {} columns", f"answer its rows with `blendserve map`, or write each row as a line {FRAME}"
)
TEXT = Format("is plain text, not JSON", _AS_FRAME)


def format_of(value: object) -> Format | None:
    """The other format that a line's JSON has; None for one of ours, also a faulty one, and for what is not known."""
    if not isinstance(value, dict):
        return None
    if "custom_id" in value:
        return _format_with_id(value)
    if "method" in value or "url" in value or "body" in value:
        return None
    request, requests = value.get("request"), value.get("requests")
    if isinstance(requests, list) and requests and isinstance(requests[0], dict):
        return format_of(requests[0]) or WRAPPED
    if "contents" in value or (isinstance(request, dict) and "contents" in request):
        return GEMINI
    for field, found in (
        *(("modelInput", BEDROCK), ("messages", CHATS), ("prompt", PROMPTS)),
        *(("instruction", INSTRUCTIONS), ("text", TEXTS), ("conversations", SHAREGPT)),
    ):
        if field in value:
            return found
    return None


def _format_with_id(value: Mapping[str, Any]) -> Format | None:
    if "body" in value:
        return None if "method" in value or "url" in value else MISTRAL
    if "params" in value:
        return ANTHROPIC
    if "response" in value:
        return OUTPUT_ROWS
    return FLAT if "messages" in value or "prompt" in value or "input" in value else None


class FormatWatch:
    """Sees every line of a file, and says at last whether the file as a whole has another format.

    `add` takes a line's bytes and what was read of it: its JSON, or None where it is none.
    """

    def __init__(self) -> None:
        self._head: list[bytes] = []
        self._found: Counter[Format | None] = Counter()
        self._has_ours = False
        self._opens_array = False

    def add(self, line: bytes, value: object) -> None:
        if self._has_ours:
            return
        if not self._head:
            self._opens_array = line.startswith(b"[") and line.endswith((b"[", b","))
        found = None
        if isinstance(value, dict) and not self._opens_array:  # the last entry of an array has no comma behind it
            found = format_of(value) or (None if _FRAME_FIELDS & value.keys() else OTHER)
            self._has_ours = found is None
        self._found[found] += 1
        if len(self._head) < _HEAD_LINES:
            self._head.append(line[:_HEAD_BYTES])

    def add_broken(self, line: bytes, custom_id: str | None) -> None:
        """A line that is no JSON. It is one of ours where it has an id, and no fault that all lines of a file have."""
        is_ours = custom_id is not None and is_utf8(line) and not line.endswith(b",")
        self.add(line, {"custom_id": custom_id} if is_ours else None)

    @property
    def is_sure(self) -> bool:
        """So many lines of other formats, and none of ours."""
        return not self._has_ours and self._found.total() >= MAX_LINES_BEFORE_VERDICT

    def verdict(self, path: Path) -> str | None:
        """Why the file cannot be read as a batch file, and what to do; None where it can."""
        if self._has_ours or not self._found:
            return None
        (found, _), *others = self._found.most_common()
        if others:
            return None
        found = found or _format_of_text(self._head)
        if found is None:
            return None
        return f"{path} {found.phrase}; {found.remedy.replace(' IN ', f' {shlex.quote(str(path))} ')}"


def _format_of_text(head: Sequence[bytes]) -> Format | None:
    """What a file is none of whose lines is a JSON object."""
    lines = [line.decode(errors="replace").strip() for line in head]
    first = lines[0]
    if head[0].startswith(b"\x1e"):
        return SEQUENCE
    if not all(map(is_utf8, head)):
        return BINARY if _CONTROLS.search(first) else ENCODED
    if first.startswith("["):
        return ARRAY
    if first.startswith("{") and len(lines) > 1 and lines[1].startswith('"'):
        return PRETTY
    if first.startswith("{'"):
        return PYTHON
    if _UNQUOTED.match(first):
        return JAVASCRIPT
    if first.startswith("{") and first.endswith(","):
        return COMMAS
    if first.startswith("<"):
        return MARKUP
    if first.startswith("{"):
        return None
    if num_columns := _num_columns(lines):
        return Format(TABLE.phrase.format(num_columns), TABLE.remedy)
    if first.startswith('"'):
        return STRINGS
    return BINARY if _CONTROLS.search(first) else TEXT


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return len(line) == _HEAD_BYTES and error.start > _HEAD_BYTES - 4  # cut within a character
    return True


def _num_columns(lines: Sequence[str]) -> int:
    """Columns of a table: as many in the first line as in the second. 0 where it is none."""
    for delimiter in (",", "\t", ";"):
        try:
            counts = [len(row) for row in csv.reader(lines[:2], delimiter=delimiter)]
        except csv.Error:
            return 0
        if len(counts) == 2 and counts[0] == counts[1] > 1:
            return counts[0]
    return 0

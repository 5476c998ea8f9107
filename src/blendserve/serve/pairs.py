"""Requests beside their answers, a page of lines at a time, and how often each error code occurs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from blendserve.dialect.rows import error_code_of

PAGE_LINES = 10
MAX_SCANNED_ROWS = 20_000
MAX_SHOWN = 20_000
"""Characters of one text that a page shows."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One line and what came of it. `row` is empty while there is no answer."""

    number: int
    custom_id: str
    question: str
    request: str
    answer: str
    row: str


def read_pairs(input_path: Path, rows: Iterable[bytes], first: int, missing: str) -> list[Pair]:
    """The lines from the one numbered `first` (of those that are not blank, counted from 0), with their rows. `missing`
    is shown in place of an answer that is not there.
    """
    with input_path.open("rb") as file:
        lines = islice(
            ((number, line) for number, line in enumerate(file, 1) if line.strip()), first, first + PAGE_LINES
        )
        shown = [(number, _custom_id(line), line) for number, line in lines]
    wanted = {custom_id for _, custom_id, _ in shown}
    found: dict[str, bytes] = {}
    for row in islice(rows, MAX_SCANNED_ROWS):
        if len(found) == len(wanted):
            break
        custom_id = _custom_id(row)
        if custom_id in wanted:
            found[custom_id] = row
    return [_pair(number, custom_id, line, found.get(custom_id, b""), missing) for number, custom_id, line in shown]


def count_codes(rows: Iterator[bytes]) -> list[tuple[str, int]]:
    """Error codes, the most frequent first."""
    return Counter(error_code_of(row) for row in islice(rows, MAX_SCANNED_ROWS)).most_common(20)


def _pair(number: int, custom_id: str, line: bytes, row: bytes, missing: str) -> Pair:
    request, answer = _json(line), _json(row) if row else None
    body = request.get("body") if isinstance(request, dict) else None
    return Pair(
        number=number,
        custom_id=custom_id,
        question=_cut(_question(body if isinstance(body, dict) else {})),
        request=_cut(json.dumps(request, indent=2, ensure_ascii=False)),
        answer=_cut(_answer(answer)) if isinstance(answer, dict) else missing,
        row=_cut(json.dumps(answer, indent=2, ensure_ascii=False)) if answer else "",
    )


def _question(body: dict[str, Any]) -> str:
    """What a body asks last."""
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else {}
    asked = last.get("content") if isinstance(last, dict) else None
    return _text(asked or body.get("prompt") or body.get("input") or "")


def _answer(row: dict[str, Any]) -> str:
    """The text of the first choice, or the message of the error."""
    body = (row.get("response") or {}).get("body") or {}
    error = row.get("error") or body.get("error")
    if isinstance(error, dict):
        return f"{error.get('code')}: {error.get('message')}"
    choices = body.get("choices")
    if isinstance(choices, list) and choices:
        message = choices[0].get("message") or {}
        return _text(message.get("content") or choices[0].get("text") or message.get("tool_calls") or "")
    return _text(body)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " ..."


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode(errors="replace").strip()


def _custom_id(data: bytes) -> str:
    value = _json(data)
    found = value.get("custom_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""

"""From a batch's journal to its two files: rows in the order of the input, and a row for every line that has none.

It needs no model, so it works for batches that were cancelled or expired before their model was loaded.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blendserve.dialect.rows import error_row
from blendserve.errors import RequestError
from blendserve.job.journal import Journal
from blendserve.job.reader import DEFAULT_MAX_LINE_BYTES
from blendserve.job.record_log import ERROR_KINDS, OUTPUT_KINDS, ROW_KINDS, Record, RecordKind, RecordLog
from blendserve.serve.blobs import Blobs, BlobWriter

_REASONS = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed because the batch was cancelled."),
    "failed": ("batch_failed", "This request was not executed because the engine failed."),
    "completed": ("server_error", "This request has no answer; send it again."),
}


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that stands among the blobs."""

    num_bytes: int
    num_lines: int
    sha256: str


@dataclass(frozen=True, slots=True)
class WrittenFiles:
    """What came of a batch. A file without rows is None. `usage` adds up the tokens of all answers."""

    output: WrittenFile | None
    errors: WrittenFile | None
    num_completed: int
    num_failed: int
    usage: dict[str, Any]


def write_files(
    blobs: Blobs, directory: Path, input_path: Path, *, output_id: str, errors_id: str, ending: str
) -> WrittenFiles:
    """Write both files of a batch under its journal's lock. Raises: CapacityError when the disk is full."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with Journal(directory) as journal, closing(journal.open_records()) as log:
        found = _Found(log)
        usage = _Usage()
        outputs, errors = blobs.create(output_id), blobs.create(errors_id)
        try:
            for row in found.rows(OUTPUT_KINDS):
                outputs.write(row)
                usage.add(row)
            for row in _merged(found, input_path, ending):
                errors.write(row)
            written = [_kept(writer) for writer in (outputs, errors)]
        except BaseException:
            outputs.abort()
            errors.abort()
            raise
        num_failed = written[1].num_lines if written[1] else 0
        return WrittenFiles(written[0], written[1], found.num_outputs, num_failed, usage.to_json())


def _kept(writer: BlobWriter) -> WrittenFile | None:
    if not writer.num_bytes:
        writer.abort()
        return None
    writer.commit()
    return WrittenFile(writer.num_bytes, writer.num_lines, writer.sha256)


class _Found:
    """Where the rows of a journal stand: 17 bytes of memory each."""

    def __init__(self, log: RecordLog) -> None:
        self._log = log
        line_numbers, offsets, kinds = array("q"), array("q"), array("b")

        def visit(record: Record) -> None:
            if record.kind in ROW_KINDS:
                line_numbers.append(record.line_number)
                offsets.append(record.offset)
                kinds.append(record.kind)

        log.recover(visit)
        order = np.argsort(np.asarray(line_numbers, np.int64), kind="stable")
        self.line_numbers = np.asarray(line_numbers, np.int64)[order]
        self._offsets = np.asarray(offsets, np.int64)[order]
        self._kinds = np.asarray(kinds, np.int8)[order]
        self.num_outputs = int((self._kinds == RecordKind.OUTPUT_ROW).sum())

    def rows(self, kinds: frozenset[RecordKind]) -> Iterator[bytes]:
        for _, row in self.numbered(kinds):
            yield row

    def numbered(self, kinds: frozenset[RecordKind]) -> Iterator[tuple[int, bytes]]:
        wanted = np.isin(self._kinds, [int(kind) for kind in kinds])
        for line_number, offset in zip(self.line_numbers[wanted], self._offsets[wanted], strict=True):
            yield int(line_number), self._log.read(int(offset)).body


def _merged(found: _Found, input_path: Path, ending: str) -> Iterator[bytes]:
    """Error rows of the journal and of the lines that have no row, in the order of the input."""
    missing = _missing_rows(input_path, set(found.line_numbers.tolist()), ending)
    later = next(missing, None)
    for line_number, row in found.numbered(ERROR_KINDS):
        while later is not None and later[0] < line_number:
            yield later[1]
            later = next(missing, None)
        yield row
    while later is not None:
        yield later[1]
        later = next(missing, None)


def _missing_rows(input_path: Path, known: set[int], ending: str) -> Iterator[tuple[int, bytes]]:
    code, message = _REASONS[ending]
    with input_path.open("rb") as file:
        line_number = 0
        while line := file.readline(DEFAULT_MAX_LINE_BYTES + 1):
            line_number += 1
            if line_number not in known and line.strip():
                error = RequestError(message, code=code, status_code=0)
                yield line_number, error_row(line_number, _custom_id(line), error)


def _custom_id(line: bytes) -> str | None:
    try:
        found = json.loads(line)["custom_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


class _Usage:
    """Tokens of all answers, in the words of OpenAI's batch object."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(("input", "cached", "output", "reasoning", "total"), 0)

    def add(self, row: bytes) -> None:
        usage = json.loads(row)["response"]["body"].get("usage")
        if not isinstance(usage, dict):
            return
        counts = self._counts
        counts["input"] += _number(usage, "prompt_tokens") or _number(usage, "input_tokens")
        counts["output"] += _number(usage, "completion_tokens") or _number(usage, "output_tokens")
        counts["total"] += _number(usage, "total_tokens")
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        counts["cached"] += _number(details, "cached_tokens")
        details = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
        counts["reasoning"] += _number(details, "reasoning_tokens")

    def to_json(self) -> dict[str, Any]:
        counts = self._counts
        return {
            "input_tokens": counts["input"],
            "input_tokens_details": {"cached_tokens": counts["cached"]},
            "output_tokens": counts["output"],
            "output_tokens_details": {"reasoning_tokens": counts["reasoning"]},
            "total_tokens": counts["total"],
        }


def _number(values: object, name: str) -> int:
    found = values.get(name) if isinstance(values, dict) else None
    return found if isinstance(found, int) else 0


def partial_rows(directory: Path, kinds: frozenset[RecordKind]) -> Iterator[bytes]:
    """Rows that a running batch has by now, in the order in which they were made."""
    path = directory / "records"
    if not path.is_file():
        return
    size = path.stat().st_size
    with closing(RecordLog(path)) as log:
        for record in log.records(size):
            if record.kind in kinds:
                yield record.body

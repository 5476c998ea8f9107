"""Answers that an earlier run of a changed job has left, found by what was asked.

The log of a job that reuses holds KEYS records: for consecutive lines, a hash of all that their answers depend on
beside the model and its settings. Zeros stand for lines that cannot be served.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blendserve.dialect.schema import BatchLine
from blendserve.job.reader import BadLine
from blendserve.job.record_log import RecordKind, RecordLog

KEY_BYTES = 16
_NO_KEY = bytes(KEY_BYTES)
_MAX_KEYS = 4096
"""Keys in one record of the log: one write and one checksum for all of them."""


def key_of(line: BatchLine) -> bytes:
    """Equal for lines that ask for the same; custom_id and line number are left out.

    They give a sampled answer its seed, but an answer that was sampled with another seed is as good.
    """
    asked = (line.url, line.model, line.prompts, line.sampling, line.body)
    return blake2b(repr(asked).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


class KeptAnswers:
    """The answered lines of an earlier log by key: about 32 bytes of memory each. Every answer is taken once: lines
    that ask for the same keep answers of their own.
    """

    def __init__(self, path: Path) -> None:
        self._log = RecordLog(path)
        self._log.recover(lambda _: None)
        keys, offsets = _answers_by_key(self._log)
        order = np.argsort(keys[:, 0], kind="stable")
        self._keys = keys[order]
        self._offsets = offsets[order]
        self._num_taken: dict[int, int] = {}

    def take(self, key: bytes) -> bytes | None:
        """The row of an answer to a line of this key that was not taken yet."""
        wanted = np.frombuffer(key, np.uint64)
        first = int(np.searchsorted(self._keys[:, 0], wanted[0]))
        at = first + self._num_taken.get(first, 0)
        if at >= len(self._keys) or not (self._keys[at] == wanted).all():
            return None
        self._num_taken[first] = at - first + 1
        return self._log.read(int(self._offsets[at])).body

    def close(self) -> None:
        self._log.close()


class KeyedLines:
    """Lines on their way into a store: the key of each goes into the log, and one whose answer is kept goes no further.

    Mutates: `log`, which gets the kept rows; `num_reused` counts them. Call `flush` behind the last line.
    """

    def __init__(self, log: RecordLog, kept: KeptAnswers | None) -> None:
        self.num_reused = 0
        self._log = log
        self._kept = kept
        self._first_line = 1
        self._keys = bytearray()

    def left(self, lines: Iterable[BatchLine | BadLine]) -> Iterator[BatchLine | BadLine]:
        """The lines that have to be answered. Line numbers must count up from 1 without gaps."""
        for line in lines:
            if isinstance(line, BadLine):
                self._keys += _NO_KEY
                yield line
                continue
            key = key_of(line)
            self._keys += key
            row = None if self._kept is None else self._kept.take(key)
            if row is None:
                yield line
            else:
                self._log.append(RecordKind.OUTPUT_ROW, line.line_number, 0, row)
                self.num_reused += 1
            if len(self._keys) >= _MAX_KEYS * KEY_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write the keys that are not in the log yet."""
        if self._keys:
            self._log.append(RecordKind.KEYS, self._first_line, 0, bytes(self._keys))
            self._first_line += len(self._keys) // KEY_BYTES
            self._keys.clear()


def _answers_by_key(log: RecordLog) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Shapes: uint64[num_answers, 2], int64[num_answers]. Lines of one key stand in the order of their numbers."""
    keys, numbers, offsets = bytearray(), array("q"), array("q")
    for record in log.records():
        if record.kind == RecordKind.KEYS:
            keys += record.body
        elif record.kind == RecordKind.OUTPUT_ROW:
            numbers.append(record.line_number)
            offsets.append(record.offset)
    table = np.frombuffer(bytes(keys), np.uint64).reshape(-1, 2)
    lines = np.asarray(numbers, np.int64) - 1
    order = np.argsort(lines, kind="stable")
    order = order[lines[order] < len(table)]  # a log that was torn in its ingestion misses the last keys
    return table[lines[order]], np.asarray(offsets, np.int64)[order]

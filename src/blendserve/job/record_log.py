"""An append-only file of checksummed records: what was written whole is found again, a torn end is cut off.

A record is on its way to the disk before `append` returns (`kill -9` cannot take it back) and survives a power cut
after the next `sync`, which comes by count and by time. One writer; the journal's lock sees to that.
Layout: length uint32, crc32 uint32, then `length` bytes: kind uint8, line number uint64, choice uint32, body;
all little endian.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from blendserve.job.disk import create_new, open_own, sync_directory, write_fully, writing_to

_FRAME = struct.Struct("<II")
_META = struct.Struct("<BQI")
_SCAN_BYTES = 1 << 20


class RecordKind(IntEnum):
    """What a body is: a finished row of one of the two files, or one choice of a line whose other choices still run.

    A CAPACITY_ROW is an error row that more memory may spare: a run with another amount takes it back. A PASSING_ROW
    is one of any other reason that may pass, such as a server that was overloaded. KEYS are hashes of lines (see
    `reuse`).
    """

    OUTPUT_ROW = 1
    ERROR_ROW = 2
    CHOICE = 3
    CAPACITY_ROW = 4
    KEYS = 5
    PASSING_ROW = 6


ERROR_KINDS = frozenset((RecordKind.ERROR_ROW, RecordKind.CAPACITY_ROW, RecordKind.PASSING_ROW))
"""Rows of the error file."""
OUTPUT_KINDS = frozenset((RecordKind.OUTPUT_ROW,))
"""Rows of the output file."""
ROW_KINDS = OUTPUT_KINDS | ERROR_KINDS
"""Rows of either file."""


class Record(NamedTuple):
    """One record; `offset` is where it begins in the file."""

    offset: int
    kind: RecordKind
    line_number: int
    choice: int
    body: bytes


class RecordLog:
    """The log at `path`, created where it is missing. Call `recover` before the first `append` to an existing one.

    Raises: CapacityError when the disk is full, BlendServeError when it cannot be written; the log is then cut back to
    its last whole record.
    """

    def __init__(
        self,
        path: Path,
        *,
        sync_records: int = 256,
        sync_interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_bytes = 0
        self._path = path
        self._sync_records = sync_records
        self._sync_interval_s = sync_interval_s
        self._clock = clock
        self._num_unsynced = 0
        self._synced_at_s = clock()
        with writing_to(path):
            self._descriptor = open_own(path, os.O_RDWR | os.O_CREAT)

    def recover(self, visit: Callable[[Record], None]) -> int:
        """Show every whole record to `visit`, in the order written, and cut off what follows. Returns: bytes cut."""
        for record in self.records(os.fstat(self._descriptor).st_size):
            visit(record)
            self.num_bytes = record.offset + _FRAME.size + _META.size + len(record.body)
        num_cut = os.fstat(self._descriptor).st_size - self.num_bytes
        if num_cut:
            with writing_to(self._path):
                os.ftruncate(self._descriptor, self.num_bytes)
                os.fsync(self._descriptor)
        return num_cut

    def drop(self, kinds: Collection[RecordKind]) -> int:
        """Take all records of some kinds out, as a whole or not at all: the others move up. Returns: how many they
        were.

        For a log that nobody has read from yet: what `append` returned before holds no longer.
        """
        end = os.fstat(self._descriptor).st_size
        num_dropped = sum(record.kind in kinds for record in self.records(end))
        if not num_dropped:
            return 0
        partial = self._path.with_name(self._path.name + ".partial")
        with writing_to(self._path):
            with open(create_new(partial), "wb", _SCAN_BYTES) as file:
                for record in self.records(end):
                    if record.kind not in kinds:
                        file.write(_frame(record.kind, record.line_number, record.choice, record.body))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
            sync_directory(self._path.parent)
            os.close(self._descriptor)
            self._descriptor = open_own(self._path, os.O_RDWR)
        return num_dropped

    def append(self, kind: RecordKind, line_number: int, choice: int, body: bytes) -> int:
        """Write one record behind the last. Returns: its offset."""
        offset = self.num_bytes
        frame = _frame(kind, line_number, choice, body)
        with writing_to(self._path):
            try:
                write_fully(self._descriptor, frame, offset)
            except OSError:
                os.ftruncate(self._descriptor, offset)
                raise
        self.num_bytes = offset + len(frame)
        self._num_unsynced += 1
        if self._num_unsynced >= self._sync_records or self._clock() - self._synced_at_s >= self._sync_interval_s:
            self.sync()
        return offset

    def sync(self) -> None:
        """Make all records survive a power cut."""
        with writing_to(self._path):
            os.fsync(self._descriptor)
        self._num_unsynced = 0
        self._synced_at_s = self._clock()

    def records(self, num_bytes: int | None = None) -> Iterator[Record]:
        """Read the whole records of the first `num_bytes` (default: all), stopping before the first damaged one."""
        return read_records(self._path, self.num_bytes if num_bytes is None else num_bytes)

    def whole_records(self) -> Iterator[Record]:
        """Read all whole records of a log that was not recovered."""
        return self.records(os.fstat(self._descriptor).st_size)

    def read(self, offset: int) -> Record:
        """Read back the record that `append` wrote at `offset`."""
        length, _ = _FRAME.unpack(os.pread(self._descriptor, _FRAME.size, offset))
        return _unpack(offset, os.pread(self._descriptor, length, offset + _FRAME.size))

    def close(self) -> None:
        """Close without syncing."""
        os.close(self._descriptor)


def read_records(path: Path, num_bytes: int | None = None) -> Iterator[Record]:
    """The whole records of the first `num_bytes` of a log (default: those that are there now), stopping before the
    first damaged one. Another process may write to it meanwhile. Raises: OSError.
    """
    with open(open_own(path), "rb", buffering=_SCAN_BYTES) as file:
        end = os.fstat(file.fileno()).st_size if num_bytes is None else num_bytes
        offset = 0
        while offset + _FRAME.size + _META.size <= end:
            length, checksum = _FRAME.unpack(file.read(_FRAME.size))
            if length < _META.size or offset + _FRAME.size + length > end:
                return
            payload = file.read(length)
            if zlib.crc32(payload) != checksum:
                return
            yield _unpack(offset, payload)
            offset += _FRAME.size + length


def _frame(kind: RecordKind, line_number: int, choice: int, body: bytes) -> bytes:
    payload = _META.pack(kind, line_number, choice) + body
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _unpack(offset: int, payload: bytes) -> Record:
    kind, line_number, choice = _META.unpack_from(payload)
    return Record(offset, RecordKind(kind), line_number, choice, payload[_META.size :])

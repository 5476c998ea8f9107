"""What a job writes, and its writing: one file or a directory of parts, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blendserve.errors import ConfigError
from blendserve.job.disk import create_new, sync_directory, writing_to
from blendserve.tables.formats import WRITERS, Format, TableWriter, format_of

DEFAULT_ROWS_PER_FILE = 1_000_000
SUFFIX_BY_FORMAT: dict[Format, str] = {"parquet": ".parquet", "jsonl": ".jsonl", "csv": ".csv", "arrow": ".arrow"}


@dataclass(frozen=True, slots=True)
class Layout:
    """`rows_per_file` None: one file; else a directory of parts with so many rows each, the last one with the rest."""

    format: Format = "parquet"
    rows_per_file: int | None = None

    @classmethod
    def of(cls, output: str, format: Format | None = None, rows_per_file: int | None = None) -> Layout:
        """What an output path stands for: a name with the ending of a format is a file, another one a directory.

        Raises: ConfigError when path and options do not go together.
        """
        try:
            named: Format | None = None if output.endswith("/") else format_of(output)
        except ConfigError:
            named = None
        if named is not None and rows_per_file is not None:
            raise ConfigError(
                f"--rows-per-file makes a directory of parts, and {output} has the name of a file; leave one of them "
                "out"
            )
        if named is not None and format not in (None, named):
            raise ConfigError(f"--format {format} and the name of {output} do not go together; leave one of them out")
        if named is not None:
            return cls(named)
        return cls(format or "parquet", rows_per_file or DEFAULT_ROWS_PER_FILE)

    def part_name(self, number: int) -> str:
        return f"part-{number:05d}{SUFFIX_BY_FORMAT[self.format]}"


class PartsWriter:
    """Writes record batches as one layout says, to `path`, which must be free: its own earlier attempts are removed.

    `close` makes all of it durable. Raises: CapacityError when the disk is full.
    """

    def __init__(self, path: Path, layout: Layout, schema: Any, mode: int = 0o666) -> None:
        self._path, self._layout, self._schema, self._mode = path, layout, schema, mode
        self._writer: TableWriter | None = None
        self._file: Any = None
        self._num_parts = self._num_rows = 0
        remove(path)
        if layout.rows_per_file is not None:
            with writing_to(path):
                path.mkdir()

    def write(self, batch: Any) -> None:
        while batch.num_rows:
            if self._writer is None:
                self._open()
            assert self._writer is not None, "a part is open"
            room = batch.num_rows if self._layout.rows_per_file is None else self._layout.rows_per_file - self._num_rows
            with writing_to(self._path):
                self._writer.write(batch.slice(0, room))
            self._num_rows += min(room, batch.num_rows)
            batch = batch.slice(room)
            if self._num_rows == self._layout.rows_per_file:
                self._close()

    def close(self) -> None:
        if self._writer is None and not self._num_parts:
            self._open()  # a table without rows is a file with columns
        self._close()
        with writing_to(self._path):
            sync_directory(self._path if self._path.is_dir() else self._path.parent)

    def abandon(self) -> None:
        """Remove what was written."""
        if self._file is not None:
            self._file.close()
        remove(self._path)

    def _open(self) -> None:
        is_file = self._layout.rows_per_file is None
        path = self._path if is_file else self._path / self._layout.part_name(self._num_parts)
        with writing_to(path):
            self._file = open(create_new(path, self._mode), "wb", 1 << 20)  # noqa: SIM115  # until the part is full
            self._writer = WRITERS[self._layout.format](self._file, self._schema)
        self._num_parts, self._num_rows = self._num_parts + 1, 0

    def _close(self) -> None:
        if self._writer is None:
            return
        with writing_to(self._path):
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._writer = self._file = None


@contextmanager
def writing_parts(path: Path, layout: Layout, schema: Any, mode: int = 0o666) -> Iterator[PartsWriter]:
    """A writer that is closed at the end; where that is not reached, nothing stays."""
    writer = PartsWriter(path, layout, schema, mode)
    try:
        yield writer
        writer.close()
    except BaseException:
        writer.abandon()
        raise


def size_of(path: Path) -> int | None:
    """Bytes of a file, or of all files below a directory; None where there is nothing."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else None


def remove(path: Path) -> None:
    with writing_to(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def replace(new: Path, old: Path, attic: Path) -> None:
    """Put a file or a directory in place of another one. Of two directories, the old one goes into the attic first: a
    crash in between leaves neither in place.
    """
    with writing_to(old):
        remove(attic)
        if old.is_dir() and not old.is_symlink():
            old.rename(attic)
        new.replace(old)
        sync_directory(old.parent)
        remove(attic)

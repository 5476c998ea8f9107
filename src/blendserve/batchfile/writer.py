"""Where a job writes, checked before it begins, and the two files it leaves, which appear whole or not at all.

The rows are the journal's own bytes. Without error rows there is no error file.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blendserve.batchfile.disk import sync_directory, writing_to
from blendserve.batchfile.recordlog import RecordKind, RecordLog
from blendserve.errors import ConfigError

_OUTPUT_KINDS = frozenset((RecordKind.OUTPUT_ROW,))
_ERROR_KINDS = frozenset((RecordKind.ERROR_ROW, RecordKind.CAPACITY_ROW))


@dataclass(frozen=True, slots=True)
class JobPaths:
    """The files of one job, symbolic links of `output` and `errors` resolved."""

    input: Path
    output: Path
    errors: Path
    journal: Path


def resolve_paths(input_path: Path, output_path: Path, errors_path: Path | None = None) -> JobPaths:
    """Fix the paths of a job; the error file is OUT.errors.jsonl unless given.

    Raises: ConfigError when one of them is another one in disguise (links included), or cannot be written.
    """
    output = Path(os.path.realpath(output_path))
    errors = Path(os.path.realpath(errors_path)) if errors_path else output.with_name(_errors_name(output.name))
    journal = output.with_name(output.name + ".journal")
    for path, other, what in (
        (output, input_path, "the input file"),
        (errors, input_path, "the input file"),
        (errors, output, "the output file"),
    ):
        if _is_same_file(path, other):
            raise ConfigError(f"{path} is {what}; a job never writes over what it reads: choose another path")
    for path in (output, errors):
        _check_writable(path)
    if journal.exists() and not journal.is_dir():
        raise ConfigError(f"{journal} must be a directory, the journal of this job; move that file away")
    return JobPaths(input_path, output, errors, journal)


def check_not_taken(paths: JobPaths) -> None:
    """Raises: ConfigError when a new job would replace rows of another one."""
    for path in (paths.output, paths.errors):
        if path.exists() and path.stat().st_size:
            raise ConfigError(
                f"{path} exists and is not of this job; move it away, write to another file, or replace it with --fresh"
            )


def write_files(log: RecordLog, paths: JobPaths, *, is_ordered: bool) -> dict[str, int]:
    """Write both files from the rows of the journal: in input order, or in the order in which lines finished.

    Returns: bytes of every file written, by path. Raises: CapacityError when the disk is full; then neither is new.
    """
    sizes: dict[str, int] = {}
    partials: list[tuple[Path, Path]] = []
    for kinds, path in ((_ERROR_KINDS, paths.errors), (_OUTPUT_KINDS, paths.output)):
        partial = path.with_name(path.name + ".partial")
        size = _write_rows(_rows(log, kinds, is_ordered=is_ordered), partial)
        if size or kinds is _OUTPUT_KINDS:
            partials.append((partial, path))
            sizes[str(path)] = size
        else:
            partial.unlink()
            path.unlink(missing_ok=True)
    for partial, path in partials:
        with writing_to(path):
            partial.replace(path)
            sync_directory(path.parent)
    return sizes


def _rows(log: RecordLog, kinds: frozenset[RecordKind], *, is_ordered: bool) -> Iterable[bytes]:
    if not is_ordered:
        return (record.body for record in log.records() if record.kind in kinds)
    return _ordered_rows(log, kinds)


def _ordered_rows(log: RecordLog, kinds: frozenset[RecordKind]) -> Iterator[bytes]:
    """Sorted by line number: 16 bytes of memory per row, the rows themselves are read back one by one."""
    line_numbers, offsets = array("q"), array("q")
    for record in log.records():
        if record.kind in kinds:
            line_numbers.append(record.line_number)
            offsets.append(record.offset)
    for position in np.argsort(np.asarray(line_numbers)):
        yield log.read(offsets[position]).body


def _write_rows(rows: Iterable[bytes], path: Path) -> int:
    with writing_to(path):
        try:
            with path.open("wb", 1 << 20) as file:
                file.writelines(rows)
                file.flush()
                os.fsync(file.fileno())
                return file.tell()
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _errors_name(output_name: str) -> str:
    return output_name.removesuffix(".jsonl") + ".errors.jsonl"


def _is_same_file(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path == Path(os.path.realpath(other))


def _check_writable(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is not a regular file; give the path of a file to write")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no directory; make it first: mkdir -p {path.parent}")
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write in {path.parent}: {error.strerror}") from error

"""Where a job writes, checked before it begins, and the two files it leaves, which appear whole or not at all.

The rows are the journal's own bytes. Without error rows there is no error file.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blendserve.errors import ConfigError
from blendserve.job.disk import create_new, sync_directory, writing_to
from blendserve.job.record_log import ERROR_KINDS, OUTPUT_KINDS, RecordKind, RecordLog

Sizes = Mapping[str, int]
"""Bytes of files by `JobPaths.name_of`."""
OwnSizes = Mapping[str, Sequence[int]]
"""Sizes that files of a job have or may have had, by `JobPaths.name_of`: a file of another size is not its own."""


@dataclass(frozen=True, slots=True)
class JobPaths:
    """The files of one job; `output` and `errors` in directories whose links are resolved."""

    input: Path
    output: Path
    errors: Path
    journal: Path

    def name_of(self, path: Path) -> str:
        """A path as the journal has it: from the directory of the output, so that a job may move with its files."""
        return os.path.relpath(path, self.output.parent)

    def path_of(self, name: str) -> Path:
        return self.output.parent / name

    def partial_of(self, path: Path) -> Path:
        """Where one of the two files is made before it takes its place. Jobs that share an error file, each of which
        will refuse to replace the other's, make it under names of their own.
        """
        if path == self.output:
            return path.with_name(path.name + ".partial")
        key = hashlib.blake2b(os.fsencode(self.output), digest_size=4).hexdigest()
        return path.with_name(f"{path.name}.{key}.partial")

    def renamed(self, file_sizes: Mapping[str, int]) -> dict[str, int]:
        """A finished job's record by names, where older versions have whole paths."""
        return {self.name_of(self.path_of(name)): size for name, size in file_sizes.items()}

    def present_sizes(self, others: Iterable[str] = ()) -> dict[str, int]:
        """Bytes by name of what stands there now: the two files, and `others`."""
        names = (self.name_of(self.output), self.name_of(self.errors), *others)
        return {name: self.path_of(name).stat().st_size for name in names if self.path_of(name).exists()}


def resolve_paths(input_path: Path, output_path: Path, errors_path: Path | None = None) -> JobPaths:
    """Fix the paths of a job; the error file is OUT.errors.jsonl unless given. A link in the place of either is
    replaced at the end, not written through: it may be somebody else's.

    Raises: ConfigError when one of them is another one in disguise (links included), or cannot be written.
    """
    output = place_of(output_path)
    errors = place_of(errors_path) if errors_path else errors_path_of(output)
    journal = output.with_name(output.name + ".journal")
    paths = JobPaths(input_path, output, errors, journal)
    partials = paths.partial_of(output), paths.partial_of(errors)
    for path, other, what in (
        *((path, input_path, "the input file") for path in (output, errors, *partials)),
        *((path, output, "the output file") for path in (errors, partials[1])),
        (partials[0], errors, "the error file"),
    ):
        if is_same_file(path, other):
            raise ConfigError(f"{path} is {what}; a job never writes over what it reads: choose another path")
    for path in (output, errors):
        check_writable(path)
    if journal.exists() and not journal.is_dir():
        raise ConfigError(f"{journal} must be a directory, the journal of this job; move that file away")
    return paths


def why_taken(paths: JobPaths, present_sizes: Mapping[str, int], own_sizes: OwnSizes) -> str | None:
    """Why the job would replace or remove what it did not write; None where it would not. An empty file is nobody's."""
    for path in (paths.output, paths.errors):
        size = present_sizes.get(paths.name_of(path), 0)
        if size and size not in own_sizes.get(paths.name_of(path), ()):
            return (
                f"{path} exists ({size} bytes) and is not of this job; move it away, write to another file, or replace "
                "it with --fresh"
            )
    return None


def check_not_taken(paths: JobPaths, present_sizes: Sizes, own_sizes: OwnSizes) -> None:
    """Raises: ConfigError when the job would replace or remove what it did not write."""
    if (reason := why_taken(paths, present_sizes, own_sizes)) is not None:
        raise ConfigError(reason)


def why_other_errors(paths: JobPaths, recorded: str | None) -> str | None:
    """Why the job of a journal is another one by its error file; None where it is the same, or where an older version
    began it."""
    if recorded is None or recorded == paths.name_of(paths.errors):
        return None
    return (
        f"{paths.journal} belongs to a job whose error file is {paths.path_of(recorded)}, and this one's is "
        f"{paths.errors}; run it with --errors {paths.path_of(recorded)}, write to another file (-o), or discard "
        "that job with --fresh"
    )


def check_jobs_apart(all_paths: Sequence[JobPaths]) -> None:
    """Raises: ConfigError when a file that one job writes is read or written by another one."""
    if len(all_paths) < 2:
        return
    uses: dict[object, str] = {}
    for paths in all_paths:
        uses |= dict.fromkeys(_marks_of(paths.input), "is an input too")
    for paths in all_paths:
        for path, what in ((paths.output, "answers"), (paths.errors, "error rows")):
            marks = _marks_of(path)
            for mark in marks:
                if mark in uses:
                    raise ConfigError(
                        f"{path}, where the {what} to {paths.input} go, {uses[mark]}; give every input an output of "
                        "its own"
                    )
            uses |= dict.fromkeys(marks, f"would hold the {what} to {paths.input} too")


def _marks_of(path: Path) -> set[object]:
    """By what a file is known under every name: its place, with and without links, and its number on the disk."""
    marks: set[object] = {str(place_of(path)), os.path.realpath(path)}
    if path.exists():
        found = path.stat()
        marks.add((found.st_dev, found.st_ino))
    return marks


def check_apart(paths: JobPaths, others: Mapping[str, Path]) -> None:
    """Raises: ConfigError when one of `others`, paths by option, is a file of the job, or another of them."""
    taken = {
        "the input file": paths.input,
        "the output file": paths.output,
        "the error file": paths.errors,
        "the journal": paths.journal,
        "where the output file is made": paths.partial_of(paths.output),
        "where the error file is made": paths.partial_of(paths.errors),
    }
    for option, path in others.items():
        for what, other in taken.items():
            if is_same_file(path, other):
                raise ConfigError(f"{option} {path} is {what}; choose another path")
        taken[f"also {option}"] = path


def write_partials(log: RecordLog, paths: JobPaths, *, is_ordered: bool) -> dict[str, int]:
    """Write the rows of the journal beside both files: in input order, or in the order in which lines finished.

    Returns: bytes by `JobPaths.name_of`, of the error file only where it has any. Raises: CapacityError when the disk
    is full.
    """
    sizes: dict[str, int] = {}
    for kinds, path in ((ERROR_KINDS, paths.errors), (OUTPUT_KINDS, paths.output)):
        size = _write_rows(_rows(log, kinds, is_ordered=is_ordered), path, paths)
        if size or kinds is OUTPUT_KINDS:
            sizes[paths.name_of(path)] = size
        else:
            paths.partial_of(path).unlink()
    return sizes


def replace_files(paths: JobPaths, sizes: Mapping[str, int]) -> None:
    """Put what `write_partials` wrote in place of what the job may replace; without error rows no error file stays."""
    for path in (paths.errors, paths.output):
        with writing_to(path):
            if paths.name_of(path) in sizes:
                paths.partial_of(path).replace(path)
            else:
                path.unlink(missing_ok=True)
            sync_directory(path.parent)


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


def _write_rows(rows: Iterable[bytes], target: Path, paths: JobPaths) -> int:
    """Answers are as private as the file that they replace, else as the questions: no more may read the one file than
    the other.
    """
    path = paths.partial_of(target)
    with writing_to(path):
        try:
            with open(create_new(path, paths.input.stat().st_mode & 0o666), "wb", 1 << 20) as file:
                if target.exists() and not target.is_symlink():
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                file.writelines(rows)
                file.flush()
                os.fsync(file.fileno())
                return file.tell()
        except OSError:
            path.unlink(missing_ok=True)
            raise


def place_of(path: Path) -> Path:
    """The name in its directory, the links of the directory alone resolved."""
    directory = os.path.realpath(path.parent) if path.name else os.path.realpath(path)
    return Path(directory, path.name)


def errors_path_of(output: Path) -> Path:
    """Where error rows go that nobody gave a place: OUT.errors.jsonl beside OUT.jsonl."""
    return output.with_name(output.name.removesuffix(".jsonl") + ".errors.jsonl")


def is_same_file(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return place_of(path) == place_of(other) or os.path.realpath(path) == os.path.realpath(other)


def check_writable(path: Path) -> None:
    """Raises: ConfigError when no file can be written there."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is not a regular file; give the path of a file to write")
    check_directory(path)


def check_directory(path: Path) -> None:
    """Raises: ConfigError when nothing can be written beside `path`."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not a directory; make it first: mkdir -p {path.parent}")
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".probe", dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write in {path.parent}: {error.strerror}; choose another place with -o") from error

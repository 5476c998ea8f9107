"""The two ends of a job: where its lines come from, and what becomes of its rows. A batch file is the plainest case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from blendserve.dialect.schema import BatchLine, ServedModel
from blendserve.job.input_file import check_readable, sha256_of
from blendserve.job.reader import DEFAULT_LIMITS, BadLine, BatchReader, ReadLimits
from blendserve.job.record_log import RecordLog
from blendserve.job.writer import JobPaths, Sizes, replace_files, resolve_paths, write_partials


class Lines(Protocol):
    """One pass over the input. The three values hold once the pass has ended, as in `BatchReader`."""

    sha256: str
    num_lines: int
    requested_model: str | None

    def __iter__(self) -> Iterator[BatchLine | BadLine]: ...


class Door(Protocol):
    """One way into a job and out of it.

    `reuses`: lines that did not change keep their answers when the input changes; the journal then keeps them after
    the end of the job too. `present_sizes`: bytes by `JobPaths.name_of` of what stands where rows go, and of `others`.
    `write_partials` writes the rows beside their places and returns their sizes; `replace_files` puts them in place.
    `notes` are sentences that the user should read, once rows are written.
    """

    @property
    def paths(self) -> JobPaths: ...
    @property
    def reuses(self) -> bool: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def sha256(self) -> str: ...
    def lines(self) -> Lines: ...
    def present_sizes(self, others: Iterable[str] = ()) -> dict[str, int]: ...
    def write_partials(self, log: RecordLog, *, is_ordered: bool) -> Sizes: ...
    def replace_files(self, sizes: Sizes) -> None: ...


class BatchFile:
    """A `Door`: a batch file of JSON lines, and the two files of its rows.

    Raises: ConfigError when a path cannot be read or written.
    """

    reuses = False
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        input_path: Path,
        output_path: Path,
        errors_path: Path | None,
        served: ServedModel,
        limits: ReadLimits = DEFAULT_LIMITS,
    ) -> None:
        check_readable(input_path)
        self.paths = resolve_paths(input_path, output_path, errors_path)
        self._served = served
        self._limits = limits

    def sha256(self) -> str:
        return sha256_of(self.paths.input)

    def lines(self) -> Lines:
        return BatchReader(self.paths.input, self._served, self._limits, refuses_other_models=True)

    def present_sizes(self, others: Iterable[str] = ()) -> dict[str, int]:
        return self.paths.present_sizes(others)

    def write_partials(self, log: RecordLog, *, is_ordered: bool) -> Sizes:
        return write_partials(log, self.paths, is_ordered=is_ordered)

    def replace_files(self, sizes: Sizes) -> None:
        replace_files(self.paths, sizes)

"""The rows that a job has so far, copied out of its journal, or out of its files once it is finished.

Nothing is locked: the job may run meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blendserve.errors import ConfigError
from blendserve.job.disk import create_new, writing_to
from blendserve.job.journal import read_header, read_seal, records_path
from blendserve.job.record_log import RecordKind, read_records

_SUFFIX = ".journal"


@dataclass(frozen=True, slots=True)
class JobSoFar:
    """A job as its journal tells it. `errors` may not exist."""

    journal: Path
    output: Path
    errors: Path
    num_lines: int
    is_finished: bool
    generation: int

    def rows(self) -> Iterator[tuple[bool, bytes]]:
        """Every row of the job, and whether it is an answer."""
        if self.is_finished:
            for path, is_answer in ((self.output, True), (self.errors, False)):
                if path.exists():
                    with path.open("rb") as file:
                        yield from ((is_answer, row) for row in file)
            return
        try:
            for record in read_records(records_path(self.journal, self.generation)):
                if record.kind != RecordKind.CHOICE:
                    yield record.kind == RecordKind.OUTPUT_ROW, record.body
        except FileNotFoundError:  # it has finished since
            yield from find_job(self.journal).rows()


def find_job(path: Path) -> JobSoFar:
    """The job of a journal, given the journal or the output. Raises: ConfigError where there is none to be read."""
    journal = path if path.name.endswith(_SUFFIX) else path.with_name(path.name + _SUFFIX)
    if not journal.is_dir():
        raise ConfigError(f"there is no journal {journal}; give the output of a job that was begun, or its journal")
    output = journal.with_name(journal.name.removesuffix(_SUFFIX))
    seal, header = read_seal(journal), read_header(journal)
    if seal is not None and output.exists():
        return JobSoFar(
            journal, output, output.parent / seal.errors_name, seal.report["num_lines"], True, seal.generation
        )
    if header is None:
        raise ConfigError(f"{journal} holds no answers yet: the job is still reading its input, or was stopped there")
    errors = output.parent / header.errors_name
    return JobSoFar(journal, output, errors, header.num_lines, False, header.generation)


def export_rows(job: JobSoFar, output: Path, errors: Path) -> tuple[int, int]:
    """Write answers and error rows to two new files; without error rows there is no error file. Returns: how many of
    each. Mutates: nothing of the job. Raises: ConfigError when a file would be one of the job's, or exists;
    CapacityError when the disk is full.
    """
    for path in (output, errors):
        if path.resolve() in (job.output.resolve(), job.errors.resolve()):
            raise ConfigError(f"{path} is a file of the job itself; give -o another path")
        if path.exists():
            raise ConfigError(f"{path} exists; give -o another path, or remove it first")
    counts = [0, 0]
    with writing_to(output), open(create_new(output), "wb") as answered, open(create_new(errors), "wb") as failed:
        for is_answer, row in job.rows():
            (answered if is_answer else failed).write(row)
            counts[not is_answer] += 1
    if not counts[1]:
        errors.unlink()
    return counts[0], counts[1]

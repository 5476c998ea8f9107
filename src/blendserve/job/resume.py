"""What to do about what an earlier run of a job has left: a pure decision over values that others have read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from blendserve.job.journal import JobIdentity, JournalHeader, JournalSeal, is_changed_input, why_another_job
from blendserve.job.record_log import RecordKind
from blendserve.job.writer import JobPaths, OwnSizes, why_other_errors, why_taken


@dataclass(frozen=True, slots=True)
class Recorded:
    """What stands on the disk. `present_sizes`: bytes of the output file, the error file and the files that `seal`
    names, by `JobPaths.name_of`; those that do not exist are left out. `has_answers`: some request was answered.
    `own_sizes`: of files of a table that has changed and was being read.
    """

    seal: JournalSeal | None
    header: JournalHeader | None
    present_sizes: Mapping[str, int]
    has_answers: bool = True
    own_sizes: OwnSizes = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The job as it is asked for now. `identity` is None where nothing is recorded that it could be compared with.
    `reuses`: rows of a table that did not change keep their answers when the table changes. `renews`: the same of lines
    of a file, which the user has to ask for.
    """

    identity: JobIdentity | None
    paths: JobPaths
    capacity: int = 0
    is_ordered: bool = False
    is_fresh: bool = False
    retries_failed: bool = False
    reuses: bool = False
    renews: bool = False


class Start(NamedTuple):
    """Begin anew. Files of `own_sizes` are the job's own and may be replaced. `reuses`: answers that the journal holds
    are kept for rows of a table that ask for the same; otherwise nothing that it holds counts.
    """

    own_sizes: OwnSizes
    reuses: bool = False


class Continue(NamedTuple):
    """Go on with the journal of `header`. `is_sealed`: it was finished, with lines that need more memory.
    `dropped`: error rows of these kinds are taken back, so that their lines are tried again.
    """

    header: JournalHeader
    is_sealed: bool
    dropped: frozenset[RecordKind]


class Renew(NamedTuple):
    """Read the input, which has changed, anew, and keep the answers to lines that have not. `header` is None where the
    journal was finished and holds no records any more: the answers are in the output file.
    """

    own_sizes: OwnSizes
    generation: int
    header: JournalHeader | None


class Done(NamedTuple):
    """An earlier run has finished the job; `report` is its report."""

    report: Mapping[str, Any]


class Refuse(NamedTuple):
    """The user must decide; `message` says between what."""

    message: str


Decision = Start | Continue | Renew | Done | Refuse


def decide(recorded: Recorded, wanted: Wanted) -> Decision:
    """Say what a run of `wanted` does first. Mutates nothing."""
    if wanted.is_fresh:
        return Start(_in_lists(recorded.present_sizes))
    of_job = recorded.seal or recorded.header
    if of_job is not None and not recorded.has_answers and _why_another(of_job, wanted) is not None:
        return _start_over(recorded, wanted)  # nothing is lost
    if wanted.renews and (renewal := _renewal(recorded, wanted)) is not None:
        return renewal
    own_sizes = recorded.own_sizes
    is_sealed = False
    if recorded.seal is not None:
        decision = _decide_sealed(recorded.seal, recorded.present_sizes, wanted)
        if decision is not None:
            return decision
        own_sizes = _in_lists(recorded.seal.file_sizes)
        is_sealed = wanted.paths.name_of(wanted.paths.output) in recorded.present_sizes
    header = recorded.header if recorded.seal is None or is_sealed else None
    if header is not None:
        if (reason := _why_another(header, wanted)) is not None:
            return Refuse(reason)
        own_sizes = {**own_sizes, **header.own_sizes}
        if header.identity != wanted.identity:
            header = None
    if (reason := why_taken(wanted.paths, recorded.present_sizes, own_sizes)) is not None:
        return Refuse(reason)
    if header is None:
        return Start(own_sizes, wanted.reuses)
    dropped: set[RecordKind] = set()
    if wanted.retries_failed:
        dropped |= {RecordKind.CAPACITY_ROW, RecordKind.PASSING_ROW}
    if header.capacity != wanted.capacity:
        dropped.add(RecordKind.CAPACITY_ROW)
    return Continue(replace(header, own_sizes=own_sizes, capacity=wanted.capacity), is_sealed, frozenset(dropped))


def _renewal(recorded: Recorded, wanted: Wanted) -> Decision | None:
    """About a job whose input has changed: None where it has not, or where more than that differs."""
    of_job = recorded.seal or recorded.header
    if of_job is None or wanted.identity is None or not is_changed_input(of_job.identity, wanted.identity):
        return None
    if (reason := why_other_errors(wanted.paths, of_job.errors_name)) is not None:
        return Refuse(reason)
    own_sizes: dict[str, Sequence[int]] = dict(recorded.header.own_sizes) if recorded.header else {}
    if recorded.seal is not None:
        own_sizes |= _in_lists(recorded.seal.file_sizes)
    if (reason := why_taken(wanted.paths, recorded.present_sizes, own_sizes)) is not None:
        return Refuse(reason)
    has_records = recorded.header is not None and (recorded.seal is None or recorded.seal.num_retriable > 0)
    if not has_records and wanted.paths.name_of(wanted.paths.output) not in recorded.present_sizes:
        return Start(own_sizes)
    return Renew(own_sizes, of_job.generation + 1, recorded.header if has_records else None)


def _start_over(recorded: Recorded, wanted: Wanted) -> Decision:
    """Begin anew in the place of a job that answered nothing. Its files may be replaced, nobody else's."""
    own_sizes: dict[str, Sequence[int]] = dict(recorded.header.own_sizes) if recorded.header else {}
    if recorded.seal is not None:
        own_sizes |= _in_lists(recorded.seal.file_sizes)
    reason = why_taken(wanted.paths, recorded.present_sizes, own_sizes)
    return Start(own_sizes) if reason is None else Refuse(reason)


def _decide_sealed(seal: JournalSeal, present_sizes: Mapping[str, int], wanted: Wanted) -> Decision | None:
    """About a finished job: None where its output is gone or some of its lines may be tried again."""
    if (reason := _why_another(seal, wanted)) is not None:
        return Refuse(reason)
    output = wanted.paths.output
    if wanted.paths.name_of(output) not in present_sizes:
        return None
    for name, size in seal.file_sizes.items():
        if present_sizes.get(name, size) != size:
            changed = wanted.paths.path_of(name)
            return Refuse(
                f"this job is complete, but {changed} was changed since; move it away, or run again with --fresh"
            )
    if wanted.is_ordered and not seal.is_ordered:
        return Refuse(
            f"this job is complete, but {output} is in the order in which lines finished; run again with --ordered "
            "--fresh"
        )
    if seal.identity != wanted.identity:
        return Start(_in_lists(seal.file_sizes), wanted.reuses)
    has_other_memory = seal.num_for_memory > 0 and seal.capacity != wanted.capacity
    is_to_retry = wanted.retries_failed and seal.num_retriable > 0
    return None if has_other_memory or is_to_retry else Done(seal.report)


def _why_another(recorded: JournalHeader | JournalSeal, wanted: Wanted) -> str | None:
    assert wanted.identity is not None, "something is recorded, and nothing to compare it with"
    identity = wanted.identity
    if wanted.reuses:
        identity = replace(identity, input_sha256=recorded.identity.input_sha256)
    return why_another_job(recorded.identity, identity, wanted.paths.journal) or why_other_errors(
        wanted.paths, recorded.errors_name
    )


def _in_lists(sizes: Mapping[str, int]) -> dict[str, list[int]]:
    return {name: [size] for name, size in sizes.items()}

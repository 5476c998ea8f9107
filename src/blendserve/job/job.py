"""One batch job from file to files, crash-safe: ingest, run what is not done yet, journal, write.

The engine comes in as a function from pending requests to outputs, called only when something is left to run: a rerun
of a finished job loads no model. Killed at any moment, the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from blendserve.dialect.responses import Codec, error_row
from blendserve.dialect.schema import ServedModel
from blendserve.errors import ConfigError, ExecutorError
from blendserve.job.ingest import encode_lines
from blendserve.job.journal import JobIdentity, Journal, JournalHeader, JournalSeal, check_same_job
from blendserve.job.pending import PendingRequests
from blendserve.job.reader import DEFAULT_LIMITS, BadLine, BatchReader, ReadLimits, check_readable, sha256_of
from blendserve.job.record_log import RecordKind, RecordLog
from blendserve.job.rows import RowAssembler
from blendserve.job.store import StoreWriter, TokenStore
from blendserve.job.writer import (
    JobPaths,
    OwnSizes,
    check_not_taken,
    check_same_errors,
    replace_files,
    resolve_paths,
    write_partials,
)
from blendserve.request import SequenceOutput

Generate = Callable[[PendingRequests], Iterator[SequenceOutput]]
"""Runs requests in any order; `SequenceOutput.index` is the row of the pending requests."""


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What to answer, where to, by which model.

    `model_identity` names the weights exactly (a path, a hash); `settings` holds every other setting that changes
    answers, JSON values only. Order, threads and memory are none: they change time, not tokens. `capacity` is the
    memory setting that error rows for want of memory depend on: another one tries those lines again.
    """

    input_path: Path
    output_path: Path
    served: ServedModel
    model_identity: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    errors_path: Path | None = None
    is_ordered: bool = False
    is_fresh: bool = False
    limits: ReadLimits = DEFAULT_LIMITS
    capacity: int = 0


@dataclass(slots=True)
class JobProgress:
    """Where a job stands. `num_requests` and `num_done` count choices of valid lines, those of earlier runs included;
    tokens are of this run only.
    """

    num_requests: int
    num_done: int
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class JobReport:
    """How a job ended. `was_complete`: an earlier run had finished it and nothing was done. `num_resumed`: requests
    answered by earlier runs. `notes` are sentences that the user should read.
    """

    output_path: str
    errors_path: str | None
    num_lines: int
    num_succeeded: int
    errors_by_code: Mapping[str, int]
    served_model: str
    requested_model: str | None
    num_resumed: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    was_complete: bool = False
    notes: tuple[str, ...] = ()

    @property
    def num_failed(self) -> int:
        return sum(self.errors_by_code.values())


class JobInterrupted(KeyboardInterrupt):
    """A job stopped by Ctrl-C or one of `END_SIGNALS`, journal safe. The message says how to go on; `exit_code` is for
    the shell.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


END_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What ends a job in good order: systems that stop it, a terminal that closes, Slurm before the time is up."""


class _Terminated(KeyboardInterrupt):
    """One of `END_SIGNALS`, as it travels through the engine."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def run_job(
    job: BatchJob,
    codec: Codec,
    generate: Generate,
    *,
    on_progress: Callable[[JobProgress], None] | None = None,
    clock: Callable[[], float] = time.time,
) -> JobReport:
    """Run a batch job to its end, or to the end of one that was interrupted.

    Raises: ConfigError before any work when a path, the input or the journal does not allow it; CapacityError when the
    disk is full; ExecutorError when the engine fails; JobInterrupted. Whatever is raised later, finished work is kept.
    """
    check_readable(job.input_path)
    paths = resolve_paths(job.input_path, job.output_path, job.errors_path)
    if not (job.is_fresh or paths.journal.exists()):
        check_not_taken(paths, {})
    with Journal(paths.journal) as journal:
        return _Run(job, codec, paths, journal, clock).run(generate, on_progress or (lambda _: None))


class _Run:
    """One process's share of a job, under the journal's lock."""

    def __init__(
        self, job: BatchJob, codec: Codec, paths: JobPaths, journal: Journal, clock: Callable[[], float]
    ) -> None:
        self._job = job
        self._codec = codec
        self._paths = paths
        self._journal = journal
        self._clock = clock
        self._progress = JobProgress(0, 0)
        self._notes: list[str] = []

    def run(self, generate: Generate, on_progress: Callable[[JobProgress], None]) -> JobReport:
        try:
            with _terminable():
                return self._run(generate, on_progress)
        except KeyboardInterrupt as interrupt:
            exit_code = interrupt.exit_code if isinstance(interrupt, _Terminated) else 130
            raise JobInterrupted(self._how_to_go_on(), exit_code) from None

    def _run(self, generate: Generate, on_progress: Callable[[JobProgress], None]) -> JobReport:
        own_sizes: OwnSizes = {}
        if self._job.is_fresh:
            self._journal.discard()
            own_sizes = self._paths.present_sizes()
        seal = self._journal.seal()
        if seal is not None:
            self._check_same_job(seal)
            own_sizes = {name: [size] for name, size in seal.file_sizes.items()}
            if self._is_still_complete(seal):
                if not seal.num_retriable or seal.capacity == self._job.capacity:
                    return JobReport(**{**seal.report, "notes": tuple(seal.report["notes"]), "was_complete": True})
                check_not_taken(self._paths, own_sizes)
                self._journal.unseal()
            else:
                self._journal.discard()
        header = self._journal.header()
        if header is None:
            self._journal.discard()
        else:
            self._check_same_job(header)
            own_sizes = {**own_sizes, **header.own_sizes}
            header = replace(header, own_sizes=own_sizes)
        check_not_taken(self._paths, own_sizes)
        with closing(self._journal.open_records()) as log:
            header = self._with_this_capacity(header, log) if header else self._ingest(log, own_sizes)
            return self._serve(header, log, generate, on_progress)

    def _check_same_job(self, recorded: JournalHeader | JournalSeal) -> None:
        identity = self._identity(sha256_of(self._job.input_path))
        check_same_job(recorded.identity, identity, self._journal.directory)
        check_same_errors(self._paths, recorded.errors_name)

    def _serve(
        self, header: JournalHeader, log: RecordLog, generate: Generate, on_progress: Callable[[JobProgress], None]
    ) -> JobReport:
        store = TokenStore.open(self._journal.store_directory, header.store_files, self._job.served.max_model_len)
        rows = RowAssembler(store, log, self._codec, self._job.served.name, header.created)
        self._recover(header, log, rows)
        num_resumed = rows.num_done
        self._progress = JobProgress(store.num_requests, num_resumed)
        on_progress(self._progress)
        try:
            self._generate(rows, generate, on_progress)
        finally:
            log.sync()
        if rows.num_rows != header.num_lines:
            raise ExecutorError(
                f"the engine ended with {header.num_lines - rows.num_rows} of {header.num_lines} lines unanswered; "
                "finished ones are kept: run the same command again"
            )
        sizes = self._write_files(header, log)
        report = self._report(header, rows, num_resumed, sizes)
        self._journal.write_seal(
            JournalSeal(
                identity=header.identity,
                is_ordered=self._job.is_ordered,
                file_sizes=sizes,
                report=asdict(report),
                capacity=header.capacity,
                num_retriable=rows.num_retriable,
                errors_name=header.errors_name,
            )
        )
        return report

    def _write_files(self, header: JournalHeader, log: RecordLog) -> dict[str, int]:
        """Returns: bytes by name. The journal knows a file for the job's own before that stands there."""
        check_not_taken(self._paths, header.own_sizes)
        sizes = write_partials(log, self._paths, is_ordered=self._job.is_ordered)
        check_not_taken(self._paths, header.own_sizes)  # again: that took a while
        self._journal.write_header(header.owning(sizes))
        replace_files(self._paths, sizes)
        return sizes

    def _with_this_capacity(self, header: JournalHeader, log: RecordLog) -> JournalHeader:
        """Take back the rows that came of another amount of memory, so that their lines are tried again."""
        if header.capacity == self._job.capacity:
            return header
        log.drop(RecordKind.CAPACITY_ROW)
        header = replace(header, capacity=self._job.capacity)
        self._journal.write_header(header)
        return header

    def _ingest(self, log: RecordLog, own_sizes: OwnSizes) -> JournalHeader:
        reader = BatchReader(self._job.input_path, self._job.served, self._job.limits)
        writer = StoreWriter(self._journal.store_directory)

        def refuse(line: BadLine) -> None:
            body = error_row(line.line_number, line.custom_id, line.error)
            log.append(RecordKind.ERROR_ROW, line.line_number, 0, body)

        try:
            encode_lines(reader, self._codec, self._job.served.max_model_len, writer.add, refuse)
            store_files = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        log.sync()
        header = JournalHeader(
            identity=self._identity(reader.sha256),
            created=int(self._clock()),
            num_lines=reader.num_lines,
            requested_model=reader.requested_model,
            num_ingest_bytes=log.num_bytes,
            store_files=store_files,
            capacity=self._job.capacity,
            errors_name=self._paths.name_of(self._paths.errors),
            own_sizes=own_sizes,
        )
        self._journal.write_header(header)
        return header

    def _recover(self, header: JournalHeader, log: RecordLog, rows: RowAssembler) -> None:
        num_cut = log.recover(rows.replay)
        if log.num_bytes < header.num_ingest_bytes:
            raise ConfigError(f"{self._journal.directory} is damaged; discard the journal with --fresh")
        if num_cut:
            self._notes.append(
                f"The journal's end was torn: {num_cut} bytes of unfinished work were cut off and redone."
            )

    def _generate(self, rows: RowAssembler, generate: Generate, on_progress: Callable[[JobProgress], None]) -> None:
        pending = rows.pending()
        if not len(pending):
            return
        outputs = generate(pending)

        def apply(output: SequenceOutput) -> None:
            if output.finish_reason != "cancelled":
                rows.apply(int(pending.numbers[output.index]), output)
                self._count(output)
                on_progress(self._progress)

        try:
            for output in outputs:
                apply(output)
        except KeyboardInterrupt as interrupt:
            for output in _left_of(outputs, interrupt):
                apply(output)
            raise
        finally:
            if isinstance(outputs, Generator):
                outputs.close()  # the engine gives its memory back now, not at the next collection

    def _count(self, output: SequenceOutput) -> None:
        self._progress.num_done += 1
        self._progress.num_prompt_tokens += output.num_prompt_tokens
        self._progress.num_cached_tokens += output.num_cached_tokens
        self._progress.num_output_tokens += output.num_output_tokens

    def _identity(self, input_sha256: str) -> JobIdentity:
        served = self._job.served
        settings = {
            **self._job.settings,
            "model names": ", ".join(served.names),
            "accepts_any_name": served.accepts_any_name,
            "max_model_len": served.max_model_len,
            "vocab_size": served.vocab_size,
            "max_line_bytes": self._job.limits.max_line_bytes,
            "max_line_requests": self._job.limits.max_line_requests,
        }
        return JobIdentity(input_sha256, self._job.model_identity, json.loads(json.dumps(settings)))

    def _is_still_complete(self, seal: JournalSeal) -> bool:
        """Are the files of the finished job still there? Raises: ConfigError when they are, but not as it left them."""
        if not self._paths.output.exists():
            return False
        for name, size in seal.file_sizes.items():
            path = self._paths.path_of(name)
            if path.exists() and path.stat().st_size != size:
                raise ConfigError(
                    f"this job is complete, but {path} was changed since; move it away, or run again with --fresh"
                )
        if self._job.is_ordered and not seal.is_ordered:
            raise ConfigError(
                f"this job is complete, but {self._paths.output} is in the order in which lines finished; "
                "run again with --ordered --fresh"
            )
        return True

    def _report(
        self, header: JournalHeader, rows: RowAssembler, num_resumed: int, sizes: Mapping[str, int]
    ) -> JobReport:
        errors, served = self._paths.errors, self._job.served
        is_chosen_by_line = served.is_remote and served.accepts_any_name
        if header.requested_model not in (None, *served.names) and not is_chosen_by_line:
            self._notes.append(f"The file asks for {header.requested_model}; it was answered by {served.name}.")
        if rows.num_retriable:
            self._notes.append(
                f"{rows.num_retriable} of the lines need more KV memory than there was: with a larger --kv-memory the "
                "same command tries them again, and them alone."
            )
        return JobReport(
            output_path=str(self._paths.output),
            errors_path=str(errors) if self._paths.name_of(errors) in sizes else None,
            num_lines=header.num_lines,
            num_succeeded=rows.num_succeeded,
            errors_by_code=dict(rows.errors_by_code),
            served_model=served.name,
            requested_model=header.requested_model,
            num_resumed=num_resumed,
            num_prompt_tokens=self._progress.num_prompt_tokens,
            num_cached_tokens=self._progress.num_cached_tokens,
            num_output_tokens=self._progress.num_output_tokens,
            notes=tuple(self._notes),
        )

    def _how_to_go_on(self) -> str:
        progress = self._progress
        if not progress.num_requests:
            return "interrupted before any request ran; nothing is lost: run the same command again"
        return (
            f"interrupted: {progress.num_done} of {progress.num_requests} requests are finished and kept in "
            f"{self._journal.directory}; run the same command again to go on"
        )


def _left_of(outputs: Iterator[SequenceOutput], interrupt: KeyboardInterrupt) -> Iterator[SequenceOutput]:
    """What an engine has at hand when it is told of an interrupt that struck elsewhere."""
    if not isinstance(outputs, Generator):
        return
    with suppress(KeyboardInterrupt, StopIteration):
        output: SequenceOutput = outputs.throw(interrupt)
        while True:
            yield output
            output = next(outputs)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let `END_SIGNALS` end a job as Ctrl-C does, but for those that are ignored, as under nohup. Signals reach only
    the main thread; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise _Terminated(signum)

    heard = [number for number in END_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, terminate) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

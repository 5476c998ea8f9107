"""One batch job from file to files, crash-safe: ingest, answer what is not answered yet, journal, write.

The engine comes in as a function from pending requests to outputs, called only when something is left to run: a rerun
of a finished job loads no model. Killed at any moment, the same command goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace

from blendserve.dialect.endpoint import Codec
from blendserve.dialect.rows import error_row
from blendserve.errors import ConfigError, ExecutorError
from blendserve.job.door import BatchFile, Door
from blendserve.job.ingest import encode_lines
from blendserve.job.interrupts import Heard, JobInterrupted, left_of, terminable
from blendserve.job.job import BatchJob, JobProgress, JobReport
from blendserve.job.journal import Journal, JournalHeader, JournalSeal
from blendserve.job.pending import PendingRequests
from blendserve.job.reader import BadLine
from blendserve.job.record_log import RecordKind, RecordLog
from blendserve.job.resume import Continue, Done, Recorded, Refuse, Start, Wanted, decide
from blendserve.job.reuse import KeptAnswers, KeyedLines
from blendserve.job.rows import RowAssembler
from blendserve.job.store import StoreWriter, TokenStore
from blendserve.job.writer import OwnSizes, Sizes, check_not_taken
from blendserve.request import SequenceOutput

Generate = Callable[[PendingRequests], Iterator[SequenceOutput]]
"""Runs requests in any order; `SequenceOutput.index` is the row of the pending requests."""


def run_job(
    job: BatchJob,
    codec: Codec,
    generate: Generate,
    *,
    door: Door | None = None,
    on_progress: Callable[[JobProgress], None] | None = None,
    clock: Callable[[], float] = time.time,
) -> JobReport:
    """Run a batch job to its end, or to the end of one that was interrupted. `door`: where lines come from and rows go;
    None: the files that the job names.

    Raises: ConfigError before any work when a path, the input or the journal does not allow it; CapacityError when the
    disk is full; ExecutorError when the engine fails; JobInterrupted. Whatever is raised later, finished work is kept.
    """
    door = door or BatchFile(job.input_path, job.output_path, job.errors_path, job.served, job.limits)
    if not (job.is_fresh or door.paths.journal.exists()):
        check_not_taken(door.paths, door.present_sizes(), {})
    with Journal(door.paths.journal) as journal:
        return _Attempt(job, codec, door, journal, clock).run(generate, on_progress or (lambda _: None))


class _Attempt:
    """One process's share of a job, under the journal's lock."""

    def __init__(self, job: BatchJob, codec: Codec, door: Door, journal: Journal, clock: Callable[[], float]) -> None:
        self._job = job
        self._codec = codec
        self._door = door
        self._paths = door.paths
        self._journal = journal
        self._clock = clock
        self._progress = JobProgress(0, 0)
        self._notes: list[str] = []

    def run(self, generate: Generate, on_progress: Callable[[JobProgress], None]) -> JobReport:
        heard = Heard()
        try:
            with terminable() as heard:
                return self._run(generate, on_progress)
        except KeyboardInterrupt:
            raise JobInterrupted(self._how_to_go_on(), heard.exit_code) from None

    def _run(self, generate: Generate, on_progress: Callable[[JobProgress], None]) -> JobReport:
        """Decide what an earlier run leaves to do, then do it."""
        match self._decide():
            case Refuse(message):
                raise ConfigError(message)
            case Done(report):
                return JobReport(**{**report, "notes": tuple(report["notes"]), "was_complete": True})
            case Start(own_sizes, reuses):
                with ExitStack() as stack:
                    kept = self._kept_answers(stack, own_sizes) if reuses else None
                    if not reuses:
                        self._journal.discard()
                    log = stack.enter_context(closing(self._journal.open_records()))
                    header = self._ingest(log, own_sizes, kept)
                    return self._answer(header, log, generate, on_progress)
            case Continue(header, is_sealed, tries_again):
                if is_sealed:
                    self._journal.unseal()
                with closing(self._journal.open_records()) as log:
                    if tries_again:
                        self._try_again(header, log)
                    return self._answer(header, log, generate, on_progress)

    def _decide(self) -> Start | Continue | Done | Refuse:
        job, paths = self._job, self._paths
        seal, header = (None, None) if job.is_fresh else (self._journal.seal(), self._journal.header())
        if seal is not None:
            seal = replace(seal, file_sizes=paths.renamed(seal.file_sizes))
        present_sizes = self._door.present_sizes(() if seal is None else seal.file_sizes)
        identity = None if seal is None and header is None else job.identity(self._door.sha256())
        wanted = Wanted(identity, paths, job.capacity, job.is_ordered, job.is_fresh, self._door.reuses)
        own_sizes = {} if job.is_fresh else self._journal.own_sizes()
        return decide(Recorded(seal, header, present_sizes, own_sizes), wanted)

    def _answer(
        self, header: JournalHeader, log: RecordLog, generate: Generate, on_progress: Callable[[JobProgress], None]
    ) -> JobReport:
        """Run what is left of a job whose requests are stored, and write its files."""
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
            ),
            keeps_records=self._door.reuses,
        )
        return report

    def _kept_answers(self, stack: ExitStack, own_sizes: OwnSizes) -> KeptAnswers | None:
        """Empty the journal; its answers stay open until `stack` is closed."""
        path = self._journal.set_aside(own_sizes)
        return None if path is None else stack.enter_context(closing(KeptAnswers(path)))

    def _ingest(self, log: RecordLog, own_sizes: OwnSizes, kept: KeptAnswers | None) -> JournalHeader:
        """Read the input into the store, and a row into the log for every line that cannot or need not be answered."""
        reader = self._door.lines()
        keyed = KeyedLines(log, kept)
        lines = keyed.left(reader) if self._door.reuses else reader
        writer = StoreWriter(self._journal.store_directory)

        def refuse(line: BadLine) -> None:
            body = error_row(line.line_number, line.custom_id, line.error)
            log.append(RecordKind.ERROR_ROW, line.line_number, 0, body)

        try:
            encode_lines(lines, self._codec, self._job.served.max_model_len, writer.add, refuse)
            store_files = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        keyed.flush()
        log.sync()
        header = JournalHeader(
            identity=self._job.identity(reader.sha256),
            created=int(self._clock()),
            num_lines=reader.num_lines,
            requested_model=reader.requested_model,
            num_ingest_bytes=log.num_bytes,
            store_files=store_files,
            capacity=self._job.capacity,
            errors_name=self._paths.name_of(self._paths.errors),
            own_sizes=own_sizes,
            num_reused=keyed.num_reused,
        )
        self._journal.write_header(header)
        self._journal.discard_set_aside()
        return header

    def _try_again(self, header: JournalHeader, log: RecordLog) -> None:
        """Take back the rows that came of another amount of memory, so that their lines are tried again."""
        log.drop(RecordKind.CAPACITY_ROW)
        self._journal.write_header(header)

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
            for output in left_of(outputs, interrupt):
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

    def _write_files(self, header: JournalHeader, log: RecordLog) -> Sizes:
        """Returns: bytes by name. The journal knows a file for the job's own before that stands there."""
        door = self._door
        check_not_taken(self._paths, door.present_sizes(), header.own_sizes)
        sizes = door.write_partials(log, is_ordered=self._job.is_ordered)
        check_not_taken(self._paths, door.present_sizes(), header.own_sizes)  # again: that took a while
        self._journal.write_header(header.owning(sizes))
        door.replace_files(sizes)
        return sizes

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
        self._notes += self._door.notes
        return JobReport(
            output_path=str(self._paths.output),
            errors_path=str(errors) if self._paths.name_of(errors) in sizes else None,
            num_lines=header.num_lines,
            num_succeeded=rows.num_succeeded,
            errors_by_code=dict(rows.errors_by_code),
            served_model=served.name,
            requested_model=header.requested_model,
            num_resumed=num_resumed,
            num_reused=header.num_reused,
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

"""One process's share of a job, under its journal's lock: what is left to do, the rows as they come, the files at last.

Nothing runs here: `run` hands the pending requests to an engine, and every end of a request to `apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from blendserve.dialect.endpoint import Codec
from blendserve.dialect.rows import error_row
from blendserve.dialect.schema import BatchLine
from blendserve.errors import ConfigError, ExecutorError
from blendserve.job.door import Door
from blendserve.job.ingest import encode_lines
from blendserve.job.job import BatchJob, JobReport
from blendserve.job.journal import JobIdentity, Journal, JournalHeader, JournalSeal
from blendserve.job.pending import PendingRequests
from blendserve.job.reader import BadLine
from blendserve.job.record_log import RecordKind, RecordLog
from blendserve.job.renewal import answers_of_output, answers_of_records, carry_over
from blendserve.job.resume import Continue, Done, Recorded, Refuse, Renew, Start, Wanted, decide
from blendserve.job.reuse import KeptAnswers, KeyedLines
from blendserve.job.rows import RowAssembler
from blendserve.job.store import TokenStore
from blendserve.job.store_layout import StoredFile
from blendserve.job.store_writer import StoreWriter
from blendserve.job.writer import OwnSizes, Sizes, check_not_taken
from blendserve.request import SequenceOutput


@dataclass(slots=True)
class _Open:
    """A job whose requests are stored, with what is answered by now."""

    header: JournalHeader
    log: RecordLog
    store: TokenStore
    rows: RowAssembler
    num_resumed: int


@dataclass(slots=True)
class _Tokens:
    """Of this run."""

    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0


class Attempt:
    """`begin`, `apply` for every request that ended, `finish`. `report` is set where the job is done.

    `clock` gives Unix times; `on_answer` is told every row of the output file, those of earlier runs first.
    Raises: ConfigError when another process holds the journal.
    """

    def __init__(
        self,
        job: BatchJob,
        codec: Codec,
        door: Door,
        clock: Callable[[], float],
        on_answer: Callable[[bytes], None] | None = None,
    ) -> None:
        if not (job.is_fresh or door.paths.journal.exists()):
            check_not_taken(door.paths, door.present_sizes(), {})
        self.report: JobReport | None = None
        self.paths = door.paths
        self._door = door
        self._job = job
        self._codec = codec
        self._recorded: JobIdentity | None = None
        self._clock = clock
        self._on_answer = on_answer
        self._journal = Journal(door.paths.journal)
        self._open: _Open | None = None
        self._tokens = _Tokens()
        self._notes: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.log.close()
        self._journal.close()

    def begin(self) -> None:
        """Do what an earlier run has left to do before requests run: read the input, take error rows back.

        Raises: ConfigError where the user must decide, or the input cannot be read.
        """
        match self._decide():
            case Refuse(message):
                raise ConfigError(message)
            case Done(report):
                self.report = JobReport(**{**report, "notes": tuple(report["notes"]), "was_complete": True})
                return
            case Start(own_sizes, reuses):
                with ExitStack() as stack:
                    kept = self._kept_answers(stack, own_sizes) if reuses else None
                    if not reuses:
                        self._journal.discard()
                    header = self._ingest(own_sizes, kept=kept)
                self._journal.write_header(header)
                self._journal.discard_set_aside()
            case Renew(own_sizes, generation, earlier):
                self._journal.clear(generation)
                header = self._ingest(own_sizes, generation, earlier)
                self._journal.renew(header)
            case Continue(header, is_sealed, dropped):
                if is_sealed:
                    self._journal.unseal()
                if dropped:
                    self._take_back(header, dropped)
        self._open = self._opened(header)
        self._tell_earlier_answers()

    @property
    def num_requests(self) -> int:
        return 0 if self._open is None else self._open.store.num_requests

    @property
    def num_done(self) -> int:
        return 0 if self._open is None else self._open.rows.num_done

    @property
    def is_whole(self) -> bool:
        """Has every line its row?"""
        return self._open is None or self._open.rows.is_whole

    def pending(self) -> PendingRequests | None:
        """What is left to run; None where nothing is."""
        pending = None if self._open is None else self._open.rows.pending()
        return pending if pending is not None and len(pending) else None

    def apply(self, number: int, output: SequenceOutput) -> None:
        """Record the end of request `number` of the store."""
        assert self._open is not None, "a finished job has no requests"
        self._open.rows.apply(number, output)
        self._tokens.num_prompt += output.num_prompt_tokens
        self._tokens.num_cached += output.num_cached_tokens
        self._tokens.num_output += output.num_output_tokens

    def sync(self) -> None:
        """Make what is recorded survive a power cut."""
        if self._open is not None and self.report is None:
            self._open.log.sync()

    def finish(self) -> JobReport:
        """Write the files, once; returns the report. Raises: ExecutorError where lines have no row."""
        if self.report is not None:
            return self.report
        assert self._open is not None, "`begin` opens a job that is not done"
        header, rows, log = self._open.header, self._open.rows, self._open.log
        log.sync()
        if rows.num_rows != header.num_lines:
            raise ExecutorError(
                f"the engine ended with {header.num_lines - rows.num_rows} of {header.num_lines} lines unanswered; "
                "finished ones are kept: run the same command again"
            )
        sizes = self._write_files(header, log)
        report = self._report(self._open, sizes)
        seal = JournalSeal(
            identity=header.identity,
            is_ordered=self._job.is_ordered,
            file_sizes=sizes,
            report=asdict(report),
            capacity=header.capacity,
            num_for_memory=rows.num_for_memory,
            num_passing=rows.passing_by_code.total(),
            errors_name=header.errors_name,
            generation=header.generation,
        )
        self._journal.write_seal(seal, self._open.store.line_hashes(), keeps_records=self._door.reuses)
        self.report = report
        return report

    def _decide(self) -> Start | Continue | Renew | Done | Refuse:
        job, paths = self._job, self.paths
        seal, header = (None, None) if job.is_fresh else (self._journal.seal(), self._journal.header())
        if seal is not None:
            seal = replace(seal, file_sizes=paths.renamed(seal.file_sizes))
        present_sizes = self._door.present_sizes(() if seal is None else seal.file_sizes)
        recorded = seal or header
        self._recorded = None if recorded is None else recorded.identity
        identity = None if recorded is None else job.identity(self._door.sha256(), recorded.identity)
        own_sizes = {} if job.is_fresh else self._journal.own_sizes()
        wanted = Wanted(
            identity=identity,
            paths=paths,
            capacity=job.capacity,
            is_ordered=job.is_ordered,
            is_fresh=job.is_fresh,
            retries_failed=job.retries_failed,
            reuses=self._door.reuses,
            renews=job.reuses,
        )
        return decide(Recorded(seal, header, present_sizes, self._has_answers(seal, header), own_sizes), wanted)

    def _has_answers(self, seal: JournalSeal | None, header: JournalHeader | None) -> bool:
        if seal is not None:
            return bool(seal.report["num_succeeded"])
        if header is None:
            return False
        answers = (RecordKind.OUTPUT_ROW, RecordKind.CHOICE)
        with closing(self._journal.open_records(header.generation)) as log:
            return any(record.kind in answers for record in log.whole_records())

    def _kept_answers(self, stack: ExitStack, own_sizes: OwnSizes) -> KeptAnswers | None:
        """Empty the journal; its answers stay open until `stack` is closed."""
        path = self._journal.set_aside(own_sizes)
        return None if path is None else stack.enter_context(closing(KeptAnswers(path)))

    def _ingest(
        self,
        own_sizes: OwnSizes,
        generation: int = 0,
        earlier: JournalHeader | None = None,
        kept: KeptAnswers | None = None,
    ) -> JournalHeader:
        """Read the input into the store, and a row into the log for every line that cannot or need not be answered.
        Returns: the header; once it is written, all that counts."""
        job = self._job
        before = self._recorded if generation else None
        if before is not None and "template_date" in before.settings:
            self._codec.use_date(before.settings["template_date"])
        reader = self._door.lines()
        with closing(self._journal.open_records(generation)) as log:
            keyed = KeyedLines(log, kept)
            lines = keyed.left(reader) if self._door.reuses else reader
            store_files = self._store_lines(lines, self._journal.store_of(generation), log)
            keyed.flush()
            header = JournalHeader(
                identity=job.identity(reader.sha256, before),
                created=int(self._clock()),
                num_lines=reader.num_lines,
                requested_model=reader.requested_model,
                num_ingest_bytes=0,
                store_files=store_files,
                capacity=job.capacity,
                errors_name=self.paths.name_of(self.paths.errors),
                own_sizes=own_sizes,
                generation=generation,
                num_reused=keyed.num_reused,
            )
            if generation:
                self._carry_over(header, earlier, log)
            log.sync()
            return replace(header, num_ingest_bytes=log.num_bytes)

    def _store_lines(
        self, lines: Iterable[BatchLine | BadLine], directory: Path, log: RecordLog
    ) -> dict[str, StoredFile]:
        """Write what can be answered into a new store, and a row into the log for what cannot."""
        writer = StoreWriter(directory)

        def refuse(line: BadLine) -> None:
            log.append(
                RecordKind.ERROR_ROW, line.line_number, 0, error_row(line.line_number, line.custom_id, line.error)
            )

        try:
            encode_lines(lines, self._codec, self._job.served.max_model_len, writer.add, refuse)
            return writer.finish()
        except BaseException:
            writer.abandon()
            raise

    def _carry_over(self, header: JournalHeader, earlier: JournalHeader | None, log: RecordLog) -> None:
        """Record the answers of the generation before, from its records or, without `earlier`, from the output."""
        store = self._stored(header)
        if earlier is None:
            answers = answers_of_output(self.paths.output, self._journal.line_hashes())
            carry_over(answers, store, log)
            return
        with closing(self._journal.open_records(earlier.generation)) as before:
            carry_over(answers_of_records(before, self._stored(earlier)), store, log)

    def _take_back(self, header: JournalHeader, kinds: frozenset[RecordKind]) -> None:
        """Forget error rows whose lines are to be tried again."""
        with closing(self._journal.open_records(header.generation)) as log:
            log.drop(kinds)
        self._journal.write_header(header)

    def _stored(self, header: JournalHeader) -> TokenStore:
        directory = self._journal.store_of(header.generation)
        return TokenStore.open(directory, header.store_files, self._job.served.max_model_len)

    def _opened(self, header: JournalHeader) -> _Open:
        """A job whose requests are stored, with all that its records tell. A torn end is cut off."""
        store = self._stored(header)
        log = self._journal.open_records(header.generation)
        rows = RowAssembler(store, log, self._codec, self._job.served.name, header.created, self._on_answer)
        opened = _Open(header, log, store, rows, 0)
        self._open = opened  # from here on the log is closed with the rest
        num_cut = log.recover(rows.replay)
        store.release()
        if log.num_bytes < header.num_ingest_bytes:
            raise ConfigError(f"{self._journal.directory} is damaged; discard the journal with --fresh")
        if num_cut:
            self._notes.append(
                f"The journal's end was torn: {num_cut} bytes of unfinished work were cut off and redone."
            )
        opened.num_resumed = rows.num_done
        return opened

    def _tell_earlier_answers(self) -> None:
        if self._on_answer is None or self._open is None:
            return
        for record in self._open.log.records():
            if record.kind == RecordKind.OUTPUT_ROW:
                self._on_answer(record.body)

    def _write_files(self, header: JournalHeader, log: RecordLog) -> Sizes:
        """Returns: bytes by name. The journal knows a file for the job's own before that stands there."""
        door = self._door
        check_not_taken(self.paths, door.present_sizes(), header.own_sizes)
        sizes = door.write_partials(log, is_ordered=self._job.is_ordered)
        check_not_taken(self.paths, door.present_sizes(), header.own_sizes)  # again: that took a while
        self._journal.write_header(header.owning(sizes))
        door.replace_files(sizes)
        return sizes

    def _report(self, opened: _Open, sizes: Mapping[str, int]) -> JobReport:
        header, rows, errors, served = opened.header, opened.rows, self.paths.errors, self._job.served
        is_chosen_by_line = served.is_remote and served.accepts_any_name
        if header.requested_model not in (None, *served.names) and not is_chosen_by_line:
            self._notes.append(f"The file asks for {header.requested_model}; it was answered by {served.name}.")
        retriable = dict(rows.passing_by_code)
        if rows.num_for_memory:
            retriable["insufficient_memory"] = rows.num_for_memory
            self._notes.append(
                f"{rows.num_for_memory} of the lines need more KV memory than there was: with a larger --kv-memory the "
                "same command tries them again, and them alone."
            )
        if rows.passing_by_code:
            self._notes.append(_retry_note(rows.passing_by_code))
        self._notes += self._door.notes
        return JobReport(
            output_path=str(self.paths.output),
            errors_path=str(errors) if self.paths.name_of(errors) in sizes else None,
            num_lines=header.num_lines,
            num_succeeded=rows.num_succeeded,
            errors_by_code=dict(rows.errors_by_code),
            served_model=served.name,
            requested_model=header.requested_model,
            num_resumed=opened.num_resumed,
            num_reused=header.num_reused,
            retriable_by_code=retriable,
            num_prompt_tokens=self._tokens.num_prompt,
            num_cached_tokens=self._tokens.num_cached,
            num_output_tokens=self._tokens.num_output,
            notes=tuple(self._notes),
        )


def _retry_note(passing_by_code: Mapping[str, int]) -> str:
    """What may be answered on another try, and how."""
    total = sum(passing_by_code.values())
    listed = ", ".join(f"{code} {count}" for code, count in sorted(passing_by_code.items()))
    lines = "1 line" if total == 1 else f"{total} lines"
    return (
        f"{lines} failed for a reason that may pass ({listed}): the same command with --retry-failed tries "
        f"{'it' if total == 1 else 'them'} again, and keeps all other rows."
    )

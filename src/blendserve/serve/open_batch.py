"""One batch in the engine process: its journal is open, its lines are stored as tokens, and answers become rows.

The journal is that of `blendserve run`. What an earlier process wrote is taken over if it was made by the same model
and settings, else it is made again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from blendserve.dialect.endpoint import Codec
from blendserve.dialect.rows import error_row
from blendserve.dialect.schema import BatchLine, ServedModel
from blendserve.engines.base import Engine
from blendserve.errors import ConfigError
from blendserve.job.ingest import TokenLists, encode_lines
from blendserve.job.job import BatchJob
from blendserve.job.journal import JobIdentity, Journal, JournalHeader
from blendserve.job.reader import BadLine, BatchReader
from blendserve.job.record_log import RecordKind
from blendserve.job.rows import RowAssembler
from blendserve.job.store import TokenStore
from blendserve.job.store_writer import StoreWriter
from blendserve.request import SequenceOutput
from blendserve.serve.messages import BatchSpec


class WithdrawnError(Exception):
    """The batch was withdrawn while it was opened."""


class OpenBatch:
    """A batch under its journal's lock, until `close`. Threads may close it while another applies outputs.

    Raises: ConfigError when the input cannot be answered as a whole; CapacityError when the disk is full;
    WithdrawnError.
    """

    def __init__(self, spec: BatchSpec, engine: Engine, served: ServedModel, is_withdrawn: Callable[[], bool]) -> None:
        self.spec = spec
        self._served = served
        self._is_withdrawn = is_withdrawn
        self._lock = threading.Lock()
        self.is_closed = False
        self._journal = Journal(spec.directory)
        self._store_directory = spec.directory / "prompts"
        try:
            identity = _identity(spec, engine, served)
            if self._header_of(identity) is None:
                self._journal.discard()
            self._log = self._journal.open_records()
        except BaseException:
            self._journal.close()
            raise
        try:
            header = self._journal.header() or self._ingest(identity, engine.codec)
            self.num_lines = header.num_lines
            self.store = TokenStore.open(self._store_directory, header.store_files, served.max_model_len)
            self.rows = RowAssembler(self.store, self._log, engine.codec, served.name, header.created)
            self._log.recover(self.rows.replay)
        except BaseException:
            self._let_go()
            raise

    @property
    def is_complete(self) -> bool:
        return self.rows.num_rows == self.num_lines

    def apply(self, number: int, output: SequenceOutput) -> bool:
        """Journal the end of a request. Returns: False where the batch was closed meanwhile."""
        with self._lock:
            if self.is_closed:
                return False
            self.rows.apply(number, output)
            return True

    def close(self) -> None:
        """Sync the journal and give it free. Closing again does nothing."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            try:
                self._log.sync()
            finally:
                self._let_go()

    def _let_go(self) -> None:
        self._log.close()
        self._journal.close()

    def _header_of(self, identity: JobIdentity) -> JournalHeader | None:
        """What an earlier process ingested; None where that is of no use."""
        try:
            header = self._journal.header()
            if header is None or header.identity != identity:
                return None
            TokenStore.open(self._store_directory, header.store_files, self._served.max_model_len)
        except ConfigError:  # damaged: answers are made again
            return None
        records = self._journal.directory / "records"
        is_whole = records.exists() and records.stat().st_size >= header.num_ingest_bytes
        return header if is_whole else None

    def _ingest(self, identity: JobIdentity, codec: Codec) -> JournalHeader:
        spec, log = self.spec, self._log
        reader = BatchReader(spec.input_path, self._served, spec.limits)
        writer = StoreWriter(self._store_directory)

        def accept(line: BatchLine, token_ids: TokenLists) -> None:
            if self._is_withdrawn():
                raise WithdrawnError
            writer.add(line, token_ids)

        def refuse(line: BadLine) -> None:
            log.append(
                RecordKind.ERROR_ROW, line.line_number, 0, error_row(line.line_number, line.custom_id, line.error)
            )

        try:
            encode_lines(reader, codec, self._served.max_model_len, accept, refuse)
            store_files = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        log.sync()
        header = JournalHeader(
            identity=identity,
            created=spec.created_at,
            num_lines=reader.num_lines,
            requested_model=reader.requested_model,
            num_ingest_bytes=log.num_bytes,
            store_files=store_files,
            capacity=0,
            errors_name="",
        )
        self._journal.write_header(header)
        return header


def _identity(spec: BatchSpec, engine: Engine, served: ServedModel) -> JobIdentity:
    job = BatchJob(
        input_path=spec.input_path,
        output_path=spec.directory / "output.jsonl",
        served=served,
        model_identity=engine.identity,
        settings=engine.settings,
        limits=spec.limits,
    )
    return job.identity(spec.input_sha256)

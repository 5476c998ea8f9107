"""Finished sequences -> journal rows: the choices of a line are gathered until its row is whole.

The only place that applies results. What was applied before a crash comes back through `replay`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from blendserve.dialect.endpoint import Choice, Codec, StoredLine
from blendserve.dialect.extras import Extras
from blendserve.dialect.rows import (
    choice_from_bytes,
    choice_to_bytes,
    error_code_of,
    error_row,
    finished_choice,
    key_of,
    output_row,
    served_row,
)
from blendserve.errors import ExecutorError
from blendserve.job.passing import kind_of_error, kind_of_response
from blendserve.job.pending import PendingRequests
from blendserve.job.record_log import Record, RecordKind, RecordLog
from blendserve.job.store import TokenStore
from blendserve.request import SequenceOutput


class RowAssembler:
    """Which requests of a store are answered, and the rows of those that are whole.

    Choices of a line that is not whole yet stay in the journal; only their offsets are held here. A line one of whose
    choices fails is a row of the error file at once, and what its other choices still yield is dropped.
    `num_for_memory` counts the error rows that came of too little memory, `passing_by_code` those of other reasons that
    may pass. `on_answer` is told every row of the output file that is written.
    """

    def __init__(
        self,
        store: TokenStore,
        log: RecordLog,
        codec: Codec,
        model: str,
        created: int,
        on_answer: Callable[[bytes], None] | None = None,
    ) -> None:
        self.num_succeeded = 0
        self.errors_by_code: Counter[str] = Counter()
        self.num_for_memory = 0
        self.passing_by_code: Counter[str] = Counter()
        self._store = store
        self._log = log
        self._codec = codec
        self._model = model
        self._created = created
        self._on_answer = on_answer
        self._is_done = np.zeros(store.num_requests, np.bool_)
        self._is_whole = np.zeros(store.num_lines, np.bool_)
        self._num_open = store.num_lines
        self._offsets: dict[int, dict[int, int]] = {}

    @property
    def num_rows(self) -> int:
        return self.num_succeeded + self.errors_by_code.total()

    @property
    def is_whole(self) -> bool:
        """Has every line of the store its row?"""
        return not self._num_open

    @property
    def num_done(self) -> int:
        """Requests that need not run any more."""
        return int(self._is_done.sum())

    def pending(self) -> PendingRequests:
        """What is left to run."""
        return PendingRequests(self._store, np.flatnonzero(~self._is_done).astype(np.int64))

    def replay(self, record: Record) -> None:
        """Take a record of an earlier run (or of ingestion) for granted."""
        if record.kind == RecordKind.KEYS:
            return
        row = self._store.row_of(record.line_number)
        if record.kind == RecordKind.CHOICE:
            assert row is not None, "a choice of a line that is not in the store"
            line = self._store.line(row)
            self._is_done[line.first_request + record.choice] = True
            self._offsets.setdefault(row, {})[record.choice] = record.offset
            return
        self._count(record.kind, record.body)
        if row is not None:
            self._close(row, self._store.line(row))

    def apply(self, number: int, output: SequenceOutput) -> None:
        """Journal the end of request `number`. Raises: CapacityError, and ExecutorError when it had ended before."""
        row = int(self._store.line_of_request[number])
        if self._is_whole[row]:
            return
        if self._is_done[number]:
            raise ExecutorError(f"the engine ended request {number} twice; this is a bug, please report it")
        line = self._store.line(row)
        if output.response is not None:
            problem = output.error if output.response.is_success else None
            kind = kind_of_response(output.response) if problem is None else kind_of_error(problem)
            self._finish(row, line, kind, served_row(line, output.response, problem))
            return
        if output.finish_reason == "error":
            error = output.error or ExecutorError("the engine gave no reason")
            self._finish(row, line, kind_of_error(error), error_row(line.line_number, line.custom_id, error))
            return
        choice = number - line.first_request
        extras = Extras.from_bytes(self._store.body(row))
        prompt_token_ids = self._store.prompt_of(number)
        key, sampling = key_of(line.line_number, line.custom_id), self._store.sampling(row)
        finished = finished_choice(Choice(line, key, choice, prompt_token_ids, output, extras, self._codec, sampling))
        offsets = self._offsets.get(row, {})
        if len(offsets) + 1 < line.num_choices:
            body = choice_to_bytes(finished)
            offset = self._log.append(RecordKind.CHOICE, line.line_number, choice, body)
            self._offsets.setdefault(row, {})[choice] = offset
            self._is_done[number] = True
            return
        choices = {at: choice_from_bytes(self._log.read(offset).body) for at, offset in offsets.items()}
        choices[choice] = finished
        in_order = [choices[at] for at in range(line.num_choices)]
        body = output_row(line, extras, in_order, self._model, self._created)
        self._finish(row, line, RecordKind.OUTPUT_ROW, body)

    def _finish(self, row: int, line: StoredLine, kind: RecordKind, body: bytes) -> None:
        self._log.append(kind, line.line_number, 0, body)
        if kind == RecordKind.OUTPUT_ROW and self._on_answer is not None:
            self._on_answer(body)
        self._count(kind, body)
        self._close(row, line)

    def _count(self, kind: RecordKind, body: bytes) -> None:
        if kind == RecordKind.OUTPUT_ROW:
            self.num_succeeded += 1
            return
        code = error_code_of(body)
        self.errors_by_code[code] += 1
        self.num_for_memory += kind == RecordKind.CAPACITY_ROW
        if kind == RecordKind.PASSING_ROW:
            self.passing_by_code[code] += 1

    def _close(self, row: int, line: StoredLine) -> None:
        self._offsets.pop(row, None)
        self._num_open -= not self._is_whole[row]
        self._is_whole[row] = True
        self._is_done[line.first_request : line.first_request + line.num_choices] = True

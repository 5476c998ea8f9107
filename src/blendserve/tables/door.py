"""A table as a door to a job: its rows are the lines, and the rows of the journal become columns of its copy."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

from blendserve.dialect.passthrough import parse_remote_line
from blendserve.dialect.schema import BatchLine, ServedModel, parse_line
from blendserve.errors import ConfigError, RequestError
from blendserve.job.door import Lines
from blendserve.job.reader import BadLine
from blendserve.job.record_log import ROW_KINDS, RecordLog
from blendserve.job.writer import JobPaths, Sizes
from blendserve.tables.answers import AnswerColumns
from blendserve.tables.layout import Layout, size_of, writing_parts
from blendserve.tables.recipe import RowRequests
from blendserve.tables.source import TableSource
from blendserve.tables.target import Target

FieldOrder = Callable[[int], Sequence[str]]
"""The order of the fields that a prompt lists, by the number of the row, from 0."""

_LEFT_OUT_METADATA = (b"huggingface", b"ARROW:schema")
"""Descriptions of a table's columns that the answers' columns would make wrong."""


class RowLines:
    """One pass over a table: a request for every row, or why there is none."""

    def __init__(
        self, source: TableSource, requests: RowRequests, served: ServedModel, order: FieldOrder | None = None
    ) -> None:
        self.sha256 = ""
        self.num_lines = 0
        self.requested_model: str | None = None
        self._source, self._requests, self._served, self._order = source, requests, served, order
        self._parse = parse_remote_line if served.is_remote else parse_line

    def __iter__(self) -> Iterator[BatchLine | BadLine]:
        id_column = self._requests.recipe.id_column
        for file, first_row, batch in self._source.batches(self._requests.columns):
            for at, row in enumerate(batch.to_pylist()):
                order = None if self._order is None else self._order(self.num_lines)
                self.num_lines += 1
                given = None if id_column is None else row[id_column]
                yield self._line(f"{file}:{first_row + at}" if given is None else str(given), row, order)

    def _line(self, custom_id: str, row: Mapping[str, Any], order: Sequence[str] | None) -> BatchLine | BadLine:
        try:
            body = self._requests.body(row, order)
            value = {"custom_id": custom_id, "method": "POST", "url": self._requests.url, "body": body}
            return self._parse(value, self.num_lines, self._served)
        except RequestError as error:
            return BadLine(self.num_lines, custom_id, error)


class TableDoor:
    """A `Door`. Rows that did not change keep their answers when the table changes."""

    reuses = True

    def __init__(
        self,
        source: TableSource,
        requests: RowRequests,
        columns: AnswerColumns,
        served: ServedModel,
        target: Target,
        layout: Layout,
        order: FieldOrder | None = None,
    ) -> None:
        self.paths: JobPaths = target.paths
        self._source, self._requests, self._columns, self._served = source, requests, columns, served
        self._target, self._layout, self._order = target, layout, order
        self._versions: tuple[str, ...] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        count = self._columns.num_unreadable
        return (
            (f"{count} answers are not what was asked for, such as JSON that was cut off: the error column says why.",)
            if count
            else ()
        )

    def sha256(self) -> str:
        """The hash of the table, and of how its copy is laid out: both make another file."""
        self._versions = self._source.versions()
        recipe = self._requests.recipe
        laid_out = [self._layout.format, self._layout.rows_per_file, [str(one) for one in self._types()], recipe.answer]
        return hashlib.sha256(f"{self._source.digest()} {json.dumps(laid_out)}".encode()).hexdigest()

    def lines(self) -> Lines:
        lines = RowLines(self._source, self._requests, self._served, self._order)
        lines.sha256 = self.sha256()
        return lines

    def present_sizes(self, others: Iterable[str] = ()) -> dict[str, int]:  # noqa: ARG002  # no other files
        size = self._target.size()
        return {} if size is None else {self.paths.name_of(self.paths.output): size}

    def write_partials(self, log: RecordLog, *, is_ordered: bool) -> Sizes:  # noqa: ARG002  # a table has an order
        """Raises: ConfigError when the table is not the one that was read."""
        offsets = _offsets_by_row(log)
        self._columns.num_unreadable = 0
        self._check_unchanged(self._versions is None or self._versions == self._source.versions())
        self._find_dimensions(log, offsets)
        schema = _joined_schema(self._source.schema, self._types())
        mode = self.paths.input.stat().st_mode & 0o666 if self.paths.input.is_file() else 0o666
        left = iter(offsets)
        with writing_parts(self._target.staged, self._layout, schema, mode) as writer:
            for _, _, batch in self._source.batches():
                answers = [self._columns.read(log.read(offset).body) for offset in islice(left, batch.num_rows)]
                self._check_unchanged(len(answers) == batch.num_rows)
                arrays = [*batch.columns, *self._columns.arrays(answers)]
                writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
            self._check_unchanged(next(left, None) is None)
        return {self.paths.name_of(self.paths.output): size_of(self._target.staged) or 0}

    def replace_files(self, sizes: Sizes) -> None:  # noqa: ARG002  # there is one output
        self._target.put()

    def _types(self) -> list[Any]:
        return self._columns.types()

    def _find_dimensions(self, log: RecordLog, offsets: Sequence[int]) -> None:
        """Read rows until one says how long vectors are."""
        if self._requests.recipe.embed_column is not None:
            next((offset for offset in offsets if self._columns.read(log.read(offset).body).error is None), None)
            self._columns.num_unreadable = 0

    def _check_unchanged(self, is_unchanged: bool) -> None:
        if not is_unchanged:
            raise ConfigError(
                f"{self._source.name} was changed while the job ran; run the same command again: rows that did not "
                "change keep their answers"
            )


def _offsets_by_row(log: RecordLog) -> array[int]:
    """Where the row of every line is in the log: 8 bytes of memory each."""
    offsets: array[int] = array("q")
    for record in log.records():
        if record.kind in ROW_KINDS:
            missing = record.line_number - len(offsets)
            if missing > 0:
                offsets.extend(array("q", [-1]) * missing)
            offsets[record.line_number - 1] = record.offset
    return offsets


def _joined_schema(schema: Any, added: Sequence[Any]) -> Any:
    metadata = {name: value for name, value in (schema.metadata or {}).items() if name not in _LEFT_OUT_METADATA}
    return pa.schema([*schema, *added], metadata=metadata or None)

"""Formats of tables: a file as a stream of record batches, and a stream of batches as a file.

CSV columns are text, just as they stand: a type that was guessed would change "007". JSON lines keep their values; a
column that holds whole numbers and fractions becomes one of fractions.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any, Literal, Protocol, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from blendserve.errors import ConfigError
from blendserve.tables.places import Place

Format = Literal["parquet", "jsonl", "csv", "arrow"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: Mapping[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
READ_ROWS = 4096
"""Rows of a batch: enough to spare calls, few enough that a batch of long texts stays small."""
_GROUP_ROWS = 1 << 17
_GROUP_BYTES = 64 << 20
"""A row group of parquet is written when it has so many rows or bytes: this bounds memory."""


def format_of(name: str) -> Format:
    """The format that a file name tells. Raises: ConfigError when it tells none."""
    for suffix, known in SUFFIXES.items():
        if name.lower().endswith(suffix):
            return known
    raise ConfigError(f"the format of {name} is not known by its name; it must end in one of {', '.join(SUFFIXES)}")


def schema_of(place: Place) -> Any:
    """The columns of a file. JSON lines are read whole for it. Raises: ConfigError."""
    with _understood(place), place.open() as file:
        return _SCHEMAS[format_of(place.name)](file)


def batches_of(place: Place, schema: Any, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """The rows of a file as record batches of `schema`, or of some of its columns. Raises: ConfigError."""
    names = schema.names if columns is None else list(columns)
    wanted = pa.schema([schema.field(name) for name in names])
    with place.open() as file:
        batches = _BATCHES[format_of(place.name)](file, wanted)
        while True:
            with _understood(place):
                batch = next(batches, None)
                if batch is None:
                    return
                batch = _conform(batch, wanted)
            yield batch


@contextmanager
def _understood(place: Place) -> Iterator[None]:
    """Raises: ConfigError for what is no file of its format."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"cannot read {place.url}: byte {error.object[error.start]:#x} is not UTF-8 text; save the file as UTF-8"
        ) from error
    except (pa.ArrowException, ValueError, csv.Error, KeyError, OSError) as error:
        raise ConfigError(f"cannot read {place.url} as {format_of(place.name)}: {error}") from error


def _conform(batch: Any, wanted: Any) -> Any:
    if batch.schema.equals(wanted):
        return batch
    arrays = [batch.column(field.name).cast(field.type) for field in wanted]
    return pa.RecordBatch.from_arrays(arrays, schema=wanted)


def _parquet_schema(file: IO[bytes]) -> Any:
    return pq.ParquetFile(file).schema_arrow


def _parquet_batches(file: IO[bytes], wanted: Any) -> Iterator[Any]:
    source = pq.ParquetFile(file)
    if not wanted.names:  # no column is read: only rows are counted
        for begin in range(0, source.metadata.num_rows, READ_ROWS):
            yield rows_without_columns(min(READ_ROWS, source.metadata.num_rows - begin))
        return
    yield from source.iter_batches(batch_size=READ_ROWS, columns=wanted.names)


def rows_without_columns(count: int) -> Any:
    """A batch of which only the number of rows counts."""
    return pa.RecordBatch.from_struct_array(pa.array([{}] * count, pa.struct([])))


def _ipc_reader(file: IO[bytes]) -> Any:
    """Of both kinds of Arrow file: with a footer, and as a mere stream."""
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_stream(file)


def _arrow_schema(file: IO[bytes]) -> Any:
    return _ipc_reader(file).schema


def _arrow_batches(file: IO[bytes], wanted: Any) -> Iterator[Any]:
    reader = _ipc_reader(file)
    is_file = isinstance(reader, pa.ipc.RecordBatchFileReader)
    whole = (reader.get_batch(at) for at in range(reader.num_record_batches)) if is_file else iter(reader)
    for batch in whole:
        for begin in range(0, batch.num_rows, READ_ROWS):
            yield batch.slice(begin, READ_ROWS).select(wanted.names)


def _csv_rows(file: IO[bytes]) -> Iterator[list[str]]:
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        yield from csv.reader(text, strict=True)
    finally:
        text.detach()


def _csv_schema(file: IO[bytes]) -> Any:
    header = next(_csv_rows(file), [])
    if len(set(header)) != len(header):
        raise csv.Error(f"a column name stands twice in its first line: {', '.join(header)}")
    return pa.schema([(name, pa.string()) for name in header])


def _csv_batches(file: IO[bytes], wanted: Any) -> Iterator[Any]:
    rows = _csv_rows(file)
    header = next(rows, [])
    places = [header.index(name) for name in wanted.names]
    while chunk := list(islice(rows, READ_ROWS)):
        chunk = [row for row in chunk if row]
        for row in chunk:
            if len(row) != len(header):
                raise csv.Error(f"a row has {len(row)} values, and the first line names {len(header)} columns: {row}")
        columns = [pa.array([row[place] for row in chunk], pa.string()) for place in places]
        yield pa.RecordBatch.from_arrays(columns, schema=wanted) if columns else rows_without_columns(len(chunk))


def _json_rows(file: IO[bytes]) -> Iterator[list[Any]]:
    first = 1
    while lines := list(islice(file, READ_ROWS)):
        yield [_json_row(line, first + at) for at, line in enumerate(lines) if line.strip()]
        first += len(lines)


def _json_row(line: bytes, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object: {str(row)[:60]}")
    return row


def _json_column(rows: Sequence[Mapping[str, Any]], name: str, kind: Any = None) -> Any:
    try:
        return pa.array([row.get(name) for row in rows], kind)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(
            f"the values of {name} have no type in common ({error}); write all of them in one way, as text for example"
        ) from error


def _jsonl_schema(file: IO[bytes]) -> Any:
    found = pa.schema([])
    for rows in _json_rows(file):
        names = dict.fromkeys(name for row in rows for name in row)
        chunk = pa.schema([(name, _json_column(rows, name).type) for name in names])
        found = pa.unify_schemas([found, chunk], promote_options="permissive")
    return found


def _jsonl_batches(file: IO[bytes], wanted: Any) -> Iterator[Any]:
    for rows in _json_rows(file):
        columns = [_json_column(rows, field.name, field.type) for field in wanted]
        yield pa.RecordBatch.from_arrays(columns, schema=wanted) if columns else rows_without_columns(len(rows))


_SCHEMAS: Mapping[Format, Callable[[IO[bytes]], Any]] = {
    "parquet": _parquet_schema,
    "arrow": _arrow_schema,
    "csv": _csv_schema,
    "jsonl": _jsonl_schema,
}
_BATCHES: Mapping[Format, Callable[[IO[bytes], Any], Iterator[Any]]] = {
    "parquet": _parquet_batches,
    "arrow": _arrow_batches,
    "csv": _csv_batches,
    "jsonl": _jsonl_batches,
}


class TableWriter(Protocol):
    """Takes record batches of one schema, and ends the file at `close`; `file` stays open."""

    def write(self, batch: Any) -> None: ...
    def close(self) -> None: ...


class _ParquetWriter:
    """Gathers batches into row groups."""

    def __init__(self, file: IO[bytes], schema: Any) -> None:
        self._writer = pq.ParquetWriter(file, schema)
        self._schema = schema
        self._batches: list[Any] = []

    def write(self, batch: Any) -> None:
        self._batches.append(batch)
        num_rows = sum(one.num_rows for one in self._batches)
        if num_rows >= _GROUP_ROWS or sum(one.nbytes for one in self._batches) >= _GROUP_BYTES:
            self._write_group()

    def close(self) -> None:
        if self._batches:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._batches, self._schema), row_group_size=_GROUP_ROWS)
        self._batches.clear()


class _ArrowWriter:
    def __init__(self, file: IO[bytes], schema: Any) -> None:
        self._writer = pa.ipc.new_file(file, schema)

    def write(self, batch: Any) -> None:
        self._writer.write_batch(batch)

    def close(self) -> None:
        self._writer.close()


class _JsonlWriter:
    def __init__(self, file: IO[bytes], _: Any) -> None:
        self._file = file

    def write(self, batch: Any) -> None:
        self._file.writelines(_json(row).encode() + b"\n" for row in batch.to_pylist())

    def close(self) -> None: ...


class _CsvWriter:
    """Null and an empty text look the same in CSV; lists and structures are JSON, bytes base64."""

    def __init__(self, file: IO[bytes], schema: Any) -> None:
        self._text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        self._writer = csv.writer(self._text, lineterminator="\n")
        self._writer.writerow(schema.names)

    def write(self, batch: Any) -> None:
        columns = [column.to_pylist() for column in batch.columns]
        self._writer.writerows([_csv_value(value) for value in row] for row in zip(*columns, strict=True))

    def close(self) -> None:
        self._text.detach()


def _json(value: Any) -> str:
    """JSON has no NaN and no infinity: null stands for them. Bytes are base64, other values their text."""
    try:
        return json.dumps(value, ensure_ascii=False, default=_json_value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=_json_value)


def _json_value(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return _json_value(value)
    return _json(value) if isinstance(value, dict | list | bool) else value


WRITERS: Mapping[Format, Callable[[IO[bytes], Any], TableWriter]] = {
    "parquet": _ParquetWriter,
    "arrow": _ArrowWriter,
    "csv": _CsvWriter,
    "jsonl": _JsonlWriter,
}

"""A table to be read more than once: files of one schema, or what lies in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from blendserve.errors import ConfigError
from blendserve.tables.formats import READ_ROWS, SUFFIXES, batches_of, format_of, rows_without_columns, schema_of
from blendserve.tables.places import Place, find_files


class RowBatch(NamedTuple):
    """Some rows. `first_row` is the place of the first one in its file, counted from 1; `file` its name."""

    file: str
    first_row: int
    rows: Any


class TableSource(Protocol):
    """Rows in a fixed order, read as often as needed. `schema` has unique names. `versions` change when it changes."""

    name: str
    schema: Any

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[RowBatch]: ...
    def digest(self) -> str: ...
    def versions(self) -> tuple[str, ...]: ...


class FileTable:
    """Files of one schema, one after the other. Raises: ConfigError when they have other columns than the first."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.places = find_files(urls, tuple(SUFFIXES))
        self.name = self.places[0].name if len(self.places) == 1 else f"{len(self.places)} files"
        self.schema = _common_schema(self.places)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[RowBatch]:
        for place in self.places:
            row = 1
            for batch in batches_of(place, self.schema, columns):
                yield RowBatch(place.name, row, batch)
                row += batch.num_rows

    def digest(self) -> str:
        parts = [f"{place.name} {place.digest()}" for place in self.places]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def versions(self) -> tuple[str, ...]:
        return tuple(place.version() for place in self.places)


class MemoryTable:
    """A table in memory: whatever has `__arrow_c_stream__`, or is a pandas frame. Raises: ConfigError for the rest."""

    name = "table"

    def __init__(self, table: Any) -> None:
        self.table = _to_arrow(table)
        self.schema = self.table.schema
        _check_unique(self.schema, "the table")

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[RowBatch]:
        row = 1
        wanted = self.table if columns is None else self.table.select(list(columns))
        if not wanted.num_columns and self.table.num_rows:
            yield RowBatch("row", 1, rows_without_columns(self.table.num_rows))
            return
        for batch in wanted.to_batches(max_chunksize=READ_ROWS):
            yield RowBatch("row", row, batch)
            row += batch.num_rows

    def digest(self) -> str:
        """The hash of the rows as an Arrow stream."""
        sink = _HashSink()
        with pa.ipc.new_stream(pa.PythonFile(sink, "w"), self.schema) as writer:
            writer.write_table(self.table, max_chunksize=READ_ROWS)
        return sink.sha256.hexdigest()

    def versions(self) -> tuple[str, ...]:
        return ()


class _HashSink:
    closed = False

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None: ...
    def close(self) -> None: ...


def _to_arrow(table: Any) -> Any:
    if isinstance(table, pa.Table):
        return table
    if hasattr(table, "__arrow_c_stream__"):
        return pa.table(table)
    if isinstance(table, pa.RecordBatch):
        return pa.Table.from_batches([table])
    if type(table).__module__.startswith("pandas."):
        return pa.Table.from_pandas(table, preserve_index=False)
    if type(table).__module__.startswith("datasets.") and hasattr(table, "with_format") and hasattr(table, "num_rows"):
        return table.with_format("arrow")[:]  # in the order of shuffle and select
    if isinstance(table, Sequence) and table and all(isinstance(row, dict) for row in table):
        return pa.Table.from_pylist(list(table))
    raise ConfigError(
        f"the table is a {type(table).__name__}; it must be something with __arrow_c_stream__ (pyarrow, Polars, "
        "DuckDB, pandas 2.2 or later, Hugging Face datasets), a list of dicts, or a path"
    )


def _common_schema(places: Sequence[Place]) -> Any:
    first: Any = None
    merged: Any = pa.schema([])
    for place in places:
        schema = schema_of(place)
        _check_unique(schema, place.url)
        first = first if first is not None else schema
        if set(schema.names) != set(first.names) and format_of(place.name) != "jsonl":
            differing = sorted(set(schema.names) ^ set(first.names))
            raise ConfigError(
                f"{place.url} and {places[0].url} are not parts of one table: only one of them has the column "
                f"{', '.join(differing)}; give files with the same columns"
            )
        try:
            merged = pa.unify_schemas([merged, schema.remove_metadata()], promote_options="permissive")
        except pa.ArrowException as error:
            raise ConfigError(
                f"{place.url} and {places[0].url} are not parts of one table: {error}; give files with the same types"
            ) from error
    return merged.with_metadata(first.metadata)


def _check_unique(schema: Any, what: str) -> None:
    if len(set(schema.names)) != len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise ConfigError(f"{what} has two columns named {twice}; rename one of them")

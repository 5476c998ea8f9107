"""What the service remembers across restarts. `Store` is the seam; `SqliteStore` keeps it in one SQLite file.

A store belongs to one process, which alone writes to it. Several records are written in one transaction: all or none.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from blendserve.errors import ConfigError
from blendserve.serve.records import (
    BatchRecord,
    DeliveryRecord,
    FileRecord,
    Record,
    ReplyRecord,
    UploadPart,
    UploadRecord,
)

R = TypeVar("R", FileRecord, UploadRecord, BatchRecord, ReplyRecord, DeliveryRecord)

FORMAT_VERSION = 1
_MAX_CACHED = 20_000
"""Records of one kind that stay in memory as they are stored, so that polls read no disk and parse nothing."""
_TABLES: dict[type[Record], str] = {
    FileRecord: "files",
    UploadRecord: "uploads",
    BatchRecord: "batches",
    ReplyRecord: "replies",
    DeliveryRecord: "deliveries",
}


class Store(Protocol):
    """Records by kind and id. Pages list the records of one owner in the order in which they were made, or back.

    `page` gives at most `limit` records that follow the one named `after`; a `label` (the purpose of a file, the state
    of a batch) and an `owner` of None stand for all.
    """

    def get(self, kind: type[R], id: str) -> R | None: ...
    def put(self, *records: Record) -> None: ...
    def delete(self, *records: Record) -> None: ...
    def page(
        self,
        kind: type[R],
        *,
        owner: str | None = None,
        label: str | None = None,
        after: str | None = None,
        limit: int | None = None,
        is_newest_first: bool = True,
    ) -> list[R]: ...
    def expired(self, kind: type[R], now: float, label: str | None = None) -> list[R]: ...
    def stored_bytes(self, owner: str | None = None) -> int: ...
    def close(self) -> None: ...


class SqliteStore:
    """A `Store` in a SQLite file with a write-ahead log.

    Raises: ConfigError when the file is damaged, is of another format, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._cached: dict[type[Record], dict[str, Record]] = {kind: {} for kind in _TABLES}
        try:
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
            self._open()
        except sqlite3.DatabaseError as error:
            raise self._refusal(error) from error

    def get(self, kind: type[R], id: str) -> R | None:
        known = self._cached[kind].get(id)
        if known is not None:
            return known  # type: ignore[return-value]
        found = self._records(kind, "WHERE id = ?", (id,))
        return found[0] if found else None

    def put(self, *records: Record) -> None:
        with self._transaction(kept=records) as database:
            for record in records:
                table = _TABLES[type(record)]
                database.execute(
                    f"INSERT INTO {table} (id, owner, label, expires_at, num_bytes, doc) VALUES (?, ?, ?, ?, ?, ?) "
                    "ON CONFLICT (id) DO UPDATE SET label = excluded.label, expires_at = excluded.expires_at, "
                    "num_bytes = excluded.num_bytes, doc = excluded.doc",
                    (
                        record.id,
                        record.owner,
                        record.label,
                        record.expires_at,
                        _stored_bytes(record),
                        json.dumps(asdict(record)),
                    ),
                )

    def delete(self, *records: Record) -> None:
        with self._transaction(dropped=records) as database:
            for record in records:
                database.execute(f"DELETE FROM {_TABLES[type(record)]} WHERE id = ?", (record.id,))

    def page(
        self,
        kind: type[R],
        *,
        owner: str | None = None,
        label: str | None = None,
        after: str | None = None,
        limit: int | None = None,
        is_newest_first: bool = True,
    ) -> list[R]:
        table = _TABLES[kind]
        sign, order = ("<", "DESC") if is_newest_first else (">", "ASC")
        conditions = ["1"]
        values: list[Any] = []
        for column, value in (("owner", owner), ("label", label)):
            if value is not None:
                conditions.append(f"{column} = ?")
                values.append(value)
        if after is not None:
            conditions.append(f"seq {sign} (SELECT seq FROM {table} WHERE id = ?)")
            values.append(after)
        condition = f"WHERE {' AND '.join(conditions)} ORDER BY seq {order} LIMIT ?"
        return self._records(kind, condition, (*values, -1 if limit is None else limit))

    def expired(self, kind: type[R], now: float, label: str | None = None) -> list[R]:
        """Records whose time is over."""
        if label is None:
            return self._records(kind, "WHERE expires_at <= ?", (now,))
        return self._records(kind, "WHERE label = ? AND expires_at <= ?", (label, now))

    def stored_bytes(self, owner: str | None = None) -> int:
        """Bytes of all files and of the parts of unfinished uploads."""
        condition = "1" if owner is None else "owner = ?"
        values: tuple[str, ...] = () if owner is None else (owner,)
        tables = (_TABLES[FileRecord], _TABLES[UploadRecord])
        sums = [
            self._rows(f"SELECT COALESCE(SUM(num_bytes), 0) FROM {table} WHERE {condition}", values) for table in tables
        ]
        return sum(int(rows[0][0]) for rows in sums)

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _open(self) -> None:
        database = self._database
        found = database.execute("PRAGMA quick_check(1)").fetchone()
        if found[0] != "ok":
            raise sqlite3.DatabaseError(str(found[0]).strip().replace("\n", " "))
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, FORMAT_VERSION):
            raise ConfigError(
                f"{self._path} has format {version}, and this version of blendserve reads {FORMAT_VERSION}; use the "
                "version that made it, or another --data directory"
            )
        with self._transaction():
            for table in _TABLES.values():
                database.execute(
                    f"CREATE TABLE IF NOT EXISTS {table} (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT "
                    "NULL, owner TEXT NOT NULL, label TEXT NOT NULL, expires_at REAL, num_bytes INTEGER NOT NULL, doc "
                    "TEXT NOT NULL)"
                )
                database.execute(f"CREATE INDEX IF NOT EXISTS {table}_owner ON {table} (owner, seq)")
                database.execute(f"CREATE INDEX IF NOT EXISTS {table}_label ON {table} (label, seq)")
                database.execute(f"CREATE INDEX IF NOT EXISTS {table}_expires ON {table} (label, expires_at)")
            database.execute(f"PRAGMA user_version = {FORMAT_VERSION}")

    def _records(self, kind: type[R], condition: str, values: Sequence[Any]) -> list[R]:
        """What is stored, by the objects that are known of it."""
        with self._lock:
            known = self._cached[kind]
            rows = self._database.execute(f"SELECT id, doc FROM {_TABLES[kind]} {condition}", values).fetchall()
            found = [known.get(id) or _from_json(kind, doc) for id, doc in rows]
            for record in found:
                self._keep(record)
        return found  # type: ignore[return-value]

    def _rows(self, query: str, values: Sequence[Any]) -> list[Any]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    @contextmanager
    def _transaction(
        self, *, kept: Sequence[Record] = (), dropped: Sequence[Record] = ()
    ) -> Iterator[sqlite3.Connection]:
        """All or nothing; what is known of the records follows once it stands on the disk."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # a full disk may have ended it
                    self._database.execute("ROLLBACK")
                raise
            for record in kept:
                self._keep(record)
            for record in dropped:
                self._cached[type(record)].pop(record.id, None)

    def _keep(self, record: Record) -> None:
        known = self._cached[type(record)]
        known[record.id] = record
        if len(known) > _MAX_CACHED:
            del known[next(iter(known))]

    def _refusal(self, error: sqlite3.DatabaseError) -> ConfigError:
        if isinstance(error, sqlite3.OperationalError):
            return ConfigError(f"cannot open {self._path}: {error}; check the directory's permissions and free space")
        return ConfigError(
            f"{self._path} is damaged ({error}); restore it from a backup, or move it away to begin with an empty "
            "service: files and journals of batches stay where they are"
        )


def _stored_bytes(record: Record) -> int:
    if isinstance(record, FileRecord):
        return record.num_bytes
    if isinstance(record, UploadRecord) and record.status == "pending":
        return sum(part.num_bytes for part in record.parts)
    return 0


def _from_json(kind: type[R], text: str) -> R:
    values = json.loads(text)
    if kind is UploadRecord:
        values["parts"] = tuple(UploadPart(**part) for part in values["parts"])
    elif kind is BatchRecord:
        values["errors"] = tuple(values["errors"])
    return kind(**values)

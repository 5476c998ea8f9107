"""The store against a dictionary, and what it says of a damaged or foreign file."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.errors import ConfigError
from blendserve.serve.records import BatchRecord, FileRecord, UploadPart, UploadRecord, new_id
from blendserve.serve.store import SqliteStore


def file(number: int, owner: str = "", **fields: object) -> FileRecord:
    values = {"created_at": 1, "filename": "a", "purpose": "batch", "num_bytes": number, **fields}
    return FileRecord(id=f"file_{number:032x}", owner=owner, **values)  # type: ignore[arg-type]


actions = st.lists(
    st.tuples(st.sampled_from(["put", "delete"]), st.integers(0, 9), st.sampled_from(["", "k"])), max_size=30
)


@given(actions, st.sampled_from(["", "k", None]), st.booleans(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_store_does_what_a_list_does(
    tmp_path_factory: pytest.TempPathFactory,
    found: list[tuple[str, int, str]],
    owner: str | None,
    is_newest_first: bool,
    limit: int,
) -> None:
    store = SqliteStore(tmp_path_factory.mktemp("store") / "s.db")
    model: dict[str, FileRecord] = {}
    for action, number, of in found:
        record = file(number, model[file(number).id].owner if file(number).id in model else of)
        if action == "put":
            store.put(record)
            model[record.id] = record
        else:
            store.delete(record)
            model.pop(record.id, None)
    wanted = [record for record in model.values() if owner in (None, record.owner)]
    wanted = wanted[::-1] if is_newest_first else wanted
    assert store.page(FileRecord, owner=owner, is_newest_first=is_newest_first) == wanted
    pages: list[FileRecord] = []
    while page := store.page(
        FileRecord,
        owner=owner,
        after=pages[-1].id if pages else None,
        limit=limit,
        is_newest_first=is_newest_first,
    ):
        pages += page
    assert pages == wanted
    assert store.stored_bytes(owner) == sum(record.num_bytes for record in wanted)
    store.close()
    again = SqliteStore(store._path)  # what was known of records is what stands on the disk
    assert again.page(FileRecord, owner=owner, is_newest_first=is_newest_first) == wanted
    again.close()


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    upload = UploadRecord("upload_1", "", 1, "a", "batch", "", 5, 9, parts=(UploadPart("part_1", 5),))
    batch = BatchRecord("batch_1", "k", 1, "file_1", "/v1/x", "24h", 9, "file_2", "file_3", errors=({"code": "x"},))
    store = SqliteStore(tmp_path / "s.db")
    store.put(upload, batch)
    store.close()
    store = SqliteStore(tmp_path / "s.db")
    assert store.get(UploadRecord, "upload_1") == upload
    assert store.get(BatchRecord, "batch_1") == batch
    assert store.page(BatchRecord, label="validating") == [batch]
    assert store.expired(UploadRecord, 9) == [upload]
    assert store.expired(UploadRecord, 8) == []


def test_records_of_one_put_are_stored_together_or_not_at_all(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s.db")
    bad = file(2, filename=b"bytes are no JSON")
    with pytest.raises(TypeError):
        store.put(file(1), bad)
    assert store.page(FileRecord) == []
    store.put(file(3))
    assert store.page(FileRecord) == [file(3)]


def test_a_damaged_page_is_refused_clearly(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = SqliteStore(path)
    for number in range(200):
        store.put(file(number, filename="x" * 500))
    store.close()
    with path.open("r+b") as database:
        database.seek(4096 * 5)
        database.write(os.urandom(4096 * 4))
    with pytest.raises(ConfigError, match="is damaged"):
        SqliteStore(path)


def test_what_is_no_database_is_refused_clearly(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match="is damaged"):
        SqliteStore(tmp_path / "s.db")
    with pytest.raises(ConfigError, match="cannot open"):
        SqliteStore(tmp_path / "none" / "s.db")


def test_another_format_is_refused_clearly(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "s.db").close()
    with sqlite3.connect(tmp_path / "s.db") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConfigError, match="has format 99"):
        SqliteStore(tmp_path / "s.db")


def test_ids_cannot_be_guessed() -> None:
    assert len({new_id("file") for _ in range(100)}) == 100
    assert len(new_id("file")) == len("file_") + 32

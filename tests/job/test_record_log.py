"""The log's one promise: after any cut or damage, what is read back is a prefix of what was appended."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blendserve.errors import CapacityError
from blendserve.job.record_log import Record, RecordKind, RecordLog

BODIES = [b"", b"x", b"row\n" * 5, bytes(range(256)), b"\x00" * 40]


def fill(path: Path) -> list[Record]:
    log = RecordLog(path)
    for number, body in enumerate(BODIES):
        log.append(RecordKind(1 + number % 3), 10 * number, number, body)
    records = list(log.records())
    log.close()
    return records


def recovered(path: Path) -> tuple[list[Record], int]:
    """What a restart finds; it then appends one more record, which must follow the others."""
    log = RecordLog(path)
    found: list[Record] = []
    num_cut = log.recover(found.append)
    assert path.stat().st_size == log.num_bytes
    offset = log.append(RecordKind.OUTPUT_ROW, 99, 0, b"after")
    assert list(log.records()) == [*found, Record(offset, RecordKind.OUTPUT_ROW, 99, 0, b"after")]
    assert log.read(offset).body == b"after"
    log.close()
    return found, num_cut


def test_records_come_back_as_they_were_appended(tmp_path: Path) -> None:
    records = fill(tmp_path / "log")
    assert [(record.line_number, record.choice, record.body) for record in records] == [
        (10 * number, number, body) for number, body in enumerate(BODIES)
    ]
    assert recovered(tmp_path / "log") == (records, 0)


def test_a_log_cut_at_any_byte_keeps_its_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "log"
    records = fill(path)
    whole = path.read_bytes()
    ends = [*(record.offset for record in records[1:]), len(whole)]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        num_whole = sum(end <= length for end in ends)
        begin = ends[num_whole - 1] if num_whole else 0
        assert recovered(path) == (records[:num_whole], length - begin), length


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), tail=st.binary(max_size=64) | st.integers(1, 64).map(bytes))
def test_damage_and_garbage_never_bring_back_anything_but_a_prefix(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, tail: bytes
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    records = fill(path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content + tail)
    found, num_cut = recovered(path)
    num_before = sum(record.offset + 21 + len(record.body) <= at for record in records)
    assert found == records[:num_before]
    assert num_cut > 0


@pytest.mark.parametrize("num_bytes", [1, 8, 21, 22, 4096])
def test_a_tail_of_zeros_is_no_record(tmp_path: Path, num_bytes: int) -> None:
    """File systems leave zeros where a power cut met a file that had grown."""
    records = fill(tmp_path / "log")
    with (tmp_path / "log").open("ab") as file:
        file.write(bytes(num_bytes))
    assert recovered(tmp_path / "log") == (records, num_bytes)


def test_a_full_disk_leaves_whole_records_and_a_log_that_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    records = fill(path)
    log = RecordLog(path)
    log.recover(lambda _: None)
    pwrite = os.pwrite

    def fail_after_seven(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) <= 33:  # what is left of the frame below after seven bytes
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data[:7], offset)

    monkeypatch.setattr(os, "pwrite", fail_after_seven)
    with pytest.raises(CapacityError, match="run the same command again"):
        log.append(RecordKind.OUTPUT_ROW, 1, 0, b"x" * 19)
    monkeypatch.undo()
    assert list(log.records()) == records
    log.close()
    assert recovered(path) == (records, 0)


def test_syncs_come_by_count_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    syncs: list[float] = []
    monkeypatch.setattr(os, "fsync", lambda _: syncs.append(now[0]))
    log = RecordLog(tmp_path / "log", sync_records=4, sync_interval_s=1.0, clock=lambda: now[0])
    for _ in range(9):
        log.append(RecordKind.OUTPUT_ROW, 1, 0, b"")
    assert len(syncs) == 2
    now[0] = 5.0
    log.append(RecordKind.OUTPUT_ROW, 1, 0, b"")
    assert syncs == [0.0, 0.0, 5.0]
    log.close()

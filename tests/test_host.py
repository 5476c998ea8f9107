"""What the system says of a process."""

from __future__ import annotations

import os
import time
from pathlib import Path

from blendserve.host import peak_rss_bytes, process_age_s


def test_a_process_ages() -> None:
    before = process_age_s()
    time.sleep(0.05)
    after = process_age_s()
    assert before is not None
    assert after is not None
    assert 0 < before < after


def test_the_name_of_a_process_may_hold_anything(tmp_path: Path) -> None:
    """The start is the 22nd field, counted behind the name, which may hold brackets and spaces."""
    ticks = int((time.clock_gettime(time.CLOCK_BOOTTIME) - 5.0) * os.sysconf("SC_CLK_TCK"))
    stat = tmp_path / "stat"
    stat.write_text(f"7 (a ) b (c) S {' '.join(map(str, range(18)))} {ticks} 0 0")
    age_s = process_age_s(stat)
    assert age_s is not None
    assert age_s >= 4.9


def test_an_age_that_is_not_told_is_none(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("7 (a) S 1 2")
    assert process_age_s(tmp_path / "absent") is None
    assert process_age_s(tmp_path / "short") is None


def test_peak_memory_holds_what_was_taken() -> None:
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_rss_bytes() > 64 << 20

"""What the system says of a process."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from blendserve.process import peak_rss_bytes, process_age_s


def test_a_process_ages_with_the_clock() -> None:
    before, started_s = process_age_s(), time.perf_counter()
    time.sleep(0.05)
    aged_s, passed_s = process_age_s() - before, time.perf_counter() - started_s
    assert before > 0
    assert abs(aged_s - passed_s) < 0.05


def test_the_name_of_a_process_may_hold_anything(tmp_path: Path) -> None:
    """The start is the 22nd field, counted behind the name, which may hold brackets and spaces."""
    ticks = int((time.clock_gettime(time.CLOCK_BOOTTIME) - 5.0) * os.sysconf("SC_CLK_TCK"))
    stat = tmp_path / "stat"
    stat.write_text(f"7 (a ) b (c) S {' '.join(map(str, range(18)))} {ticks} 0 0")
    assert 4.9 < process_age_s(stat) < 60.0


def test_an_age_that_is_not_told_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("7 (a) S 1 2")
    assert math.isnan(process_age_s(tmp_path / "absent"))
    assert math.isnan(process_age_s(tmp_path / "short"))


def test_peak_memory_holds_what_was_taken() -> None:
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_rss_bytes() > 64 << 20

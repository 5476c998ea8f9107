"""The bench that compares measurements of a machine."""

from __future__ import annotations

from dataclasses import replace

import calibrations
from calibration_cases import CALIBRATION
from calibrations import Taken


def test_rates_that_differ_are_named() -> None:
    thorough = replace(CALIBRATION, compute_delay=0.5, memory_delay=0.5)
    short = replace(thorough, kv_bytes_per_s=1.2 * thorough.kv_bytes_per_s, compute_delay=1.0, memory_delay=1.0)
    text = calibrations.table({"first-run": [Taken(short, 2.5)], "thorough": [Taken(thorough, 60.0)]}, 0.1)
    row = {line.split("|")[1].strip(): line for line in text.splitlines()}
    assert row["KV, GB/s"].rstrip(" |").endswith("first-run")
    assert "(1.20x)" in row["KV, GB/s"]
    assert "agrees" in row["matrix products, GFLOP/s"]
    assert "differs" in row["plans count on overlap"]


def test_no_effort_is_left_out() -> None:
    assert list(calibrations.EFFORT_BY_NAME) == ["first-run", "quick", "thorough"]
    assert calibrations.EFFORT_BY_NAME["first-run"].total_s <= calibrations.MOST_FIRST_RUN_S

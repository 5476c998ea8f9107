"""What a run shows of itself: nothing before it runs, then the job's count beside what the engine knows."""

from __future__ import annotations

import io
import sys
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from blendserve.engines.base import Engine, EngineStatus
from blendserve.job.job import JobProgress
from blendserve.report.progress import Progress, Snapshot
from blendserve.report.run_display import RunDisplay, snapshot_of

PROGRESS = JobProgress(num_requests=10, num_done=4, num_prompt_tokens=80, num_cached_tokens=20, num_output_tokens=12)


def test_what_the_engine_does_not_know_comes_from_the_job() -> None:
    shown = snapshot_of(PROGRESS, EngineStatus(3, 200.0, unit="replicas busy"))
    assert shown == Snapshot(4, 10, 92, 108.0, 3, None, 0.25, "replicas busy")


def test_what_the_engine_knows_is_taken_from_it() -> None:
    shown = snapshot_of(PROGRESS, EngineStatus(3, 50.0, num_tokens=70, kv_use=0.5, prefix_hit_rate=0.1))
    assert shown == Snapshot(4, 10, 70, 0.0, 3, 0.5, 0.1)


def display_of(status: EngineStatus | None, *, is_quiet: bool = False) -> RunDisplay:
    engine: Any = SimpleNamespace(status=lambda: status)
    return RunDisplay(cast("Engine", engine), is_quiet=is_quiet)


@pytest.mark.parametrize(
    ("status", "progress", "is_quiet", "text"),
    [
        (EngineStatus(3, 200.0), PROGRESS, False, "4/10 requests, "),
        (None, PROGRESS, False, ""),  # it still loads, or all was done before
        (EngineStatus(3, 200.0), None, False, ""),
        (EngineStatus(3, 200.0), PROGRESS, True, ""),
    ],
)
def test_a_line_is_shown_once_something_runs(
    monkeypatch: pytest.MonkeyPatch,
    status: EngineStatus | None,
    progress: JobProgress | None,
    is_quiet: bool,
    text: str,
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with display_of(status, is_quiet=is_quiet) as display:
        if progress is not None:
            display.note(progress)
    assert written.getvalue().startswith(text)
    assert bool(written.getvalue()) == bool(text)


def test_rates_are_counted_from_the_first_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that were there at the beginning took no time that was seen."""
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    written = io.StringIO()
    shown: list[Snapshot | None] = [
        None,
        Snapshot(0, 10, 0, 300.0, 2, 0.5, 0.0),
        Snapshot(5, 10, 100, 200.0, 2, 0.5, 0.0),
    ]
    progress = Progress(lambda: shown[0], file=written)
    progress._show()
    assert not written.getvalue()
    shown[0] = shown[1]
    progress._show()
    now_s[0] += 2.0
    shown[0] = shown[2]
    progress._show()
    assert "5/10 requests, 50 tok/s, ETA 4s, 2 running, KV 50%" in written.getvalue().splitlines()[-1]


def test_windows_are_counted_together() -> None:
    """The engine knows one window of three; the job knows all of them."""
    progress = JobProgress(
        num_requests=130,
        num_done=60,
        num_prompt_tokens=400,
        num_output_tokens=100,
        num_windows=3,
        num_earlier=30,
    )
    shown = snapshot_of(progress, EngineStatus(3, 40.0, num_tokens=39, kv_use=0.5, prefix_hit_rate=0.1))
    assert shown.num_tokens == 500
    assert shown.num_expected_tokens == pytest.approx(500 * 70 / 30)

"""A power cut at any moment: what the disk then holds is gone on with, and ends in the files of an undisturbed run."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from batch_fakes import NUM_JOB_REQUESTS, FakeEngine, comparable, run_fake
from power_loss import Recorder

from blendserve.job.record_log import RecordLog

RECORDS_PER_SYNC = 20


@pytest.fixture
def recorder(tmp_path: Path, job_input: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Has seen a whole job."""
    disk = tmp_path / "disk"
    disk.mkdir()
    recorder = Recorder(disk)
    with monkeypatch.context() as patch:
        defaults = {**(RecordLog.__init__.__kwdefaults__ or {}), "sync_records": RECORDS_PER_SYNC}
        patch.setattr(RecordLog.__init__, "__kwdefaults__", defaults)
        patch.setattr(os, "fsync", recorder.fsync)
        run_fake(job_input, disk / "out.jsonl", is_ordered=True)
    recorder.cut()
    recorder.close()
    return recorder


def go_on(place: Path, job_input: Path, whole: Path) -> int:
    """Run the job's command again; returns how many answers had to be computed."""
    engine = FakeEngine("backward")
    run_fake(job_input, place / "out.jsonl", engine, is_ordered=True)
    for suffix in (".jsonl", ".errors.jsonl"):
        assert comparable((place / "out").with_suffix(suffix)) == comparable(whole.with_suffix(suffix))
    return engine.num_answers


@pytest.mark.parametrize("num_states", [3, pytest.param(60, marks=pytest.mark.thorough)])
def test_a_job_goes_on_after_a_power_cut_at_any_sync(
    tmp_path: Path, job_input: Path, whole: Path, recorder: Recorder, num_states: int
) -> None:
    assert len(recorder.cuts) > 15
    for number, cut in enumerate(recorder.cuts):
        for seed in range(num_states):
            place = tmp_path / f"cut-{number}-{seed}"
            cut.write(place, random.Random(1000 * number + seed))
            go_on(place, job_input, whole)


def test_what_was_synced_is_never_computed_again(
    tmp_path: Path, job_input: Path, whole: Path, recorder: Recorder
) -> None:
    """Of every cut, the state in which nothing has reached the disk that did not have to."""

    class Never(random.Random):
        def random(self) -> float:
            return 1.0

        def randint(self, low: int, high: int) -> int:  # noqa: ARG002
            return low

    computed = []
    for number, cut in enumerate(recorder.cuts):
        place = tmp_path / f"cut-{number}"
        cut.write(place, Never())
        computed.append(go_on(place, job_input, whole))
    assert computed == sorted(computed, reverse=True)
    assert computed[0] == NUM_JOB_REQUESTS
    kept = {NUM_JOB_REQUESTS - count for count in computed}
    assert kept >= set(range(0, NUM_JOB_REQUESTS, RECORDS_PER_SYNC))
    assert computed[-1] == 0

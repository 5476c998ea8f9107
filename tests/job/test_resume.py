"""What a job does first, for every state in which an earlier run can have left its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blendserve.job.journal import JobIdentity, JournalHeader, JournalSeal
from blendserve.job.record_log import RecordKind
from blendserve.job.resume import Continue, Decision, Done, Recorded, Refuse, Start, Wanted, decide
from blendserve.job.store_layout import StoredFile
from blendserve.job.writer import JobPaths

JOB = JobIdentity("00ff" * 16, "tiny abc", {"dtype": "bf16"})
OTHER = JobIdentity("00ff" * 16, "tiny abc", {"dtype": "int8"})
PATHS = JobPaths(Path("/d/in.jsonl"), Path("/d/out.jsonl"), Path("/d/out.errors.jsonl"), Path("/d/out.jsonl.journal"))
HEADER = JournalHeader(
    JOB, 7, 10, "m", 100, {"tokens": StoredFile(40, "00")}, capacity=0, errors_name="out.errors.jsonl"
)
SEAL = JournalSeal(
    JOB,
    False,
    {"out.jsonl": 500},
    {"num_lines": 10},
    capacity=0,
    num_for_memory=0,
    num_passing=0,
    errors_name="out.errors.jsonl",
)
RETRIABLE = replace(SEAL, num_for_memory=2)
ALL_THERE = {"out.jsonl": 500}
NONE: frozenset[RecordKind] = frozenset()
FOR_MEMORY = frozenset((RecordKind.CAPACITY_ROW,))


def decided(recorded: Recorded, **wanted: Any) -> Decision:
    is_empty = recorded.seal is None and recorded.header is None
    return decide(recorded, Wanted(**{"identity": None if is_empty else JOB, "paths": PATHS, **wanted}))


def test_with_nothing_there_it_starts() -> None:
    assert decided(Recorded(None, None, {})) == Start({})
    assert decided(Recorded(None, None, {"out.jsonl": 0})) == Start({})  # an empty file is nobody's


def test_files_of_somebody_else_are_refused_and_replaced_when_asked() -> None:
    there = Recorded(None, None, {"out.errors.jsonl": 3})
    decision = decided(there)
    assert isinstance(decision, Refuse)
    assert decision.message.startswith("/d/out.errors.jsonl exists (3 bytes) and is not of this job; move it away")
    assert decided(there, is_fresh=True) == Start({"out.errors.jsonl": [3]})


def test_a_begun_job_goes_on() -> None:
    assert decided(Recorded(None, HEADER, {})) == Continue(HEADER, is_sealed=False, dropped=NONE)


def test_a_begun_job_knows_its_own_files() -> None:
    """A crash between writing the files and the seal leaves files that the header has noted."""
    header = replace(HEADER, own_sizes={"out.jsonl": [400, 500]})
    assert decided(Recorded(None, header, ALL_THERE)) == Continue(header, is_sealed=False, dropped=NONE)
    assert isinstance(decided(Recorded(None, header, {"out.jsonl": 501})), Refuse)


def test_another_amount_of_memory_tries_lines_again() -> None:
    decision = decided(Recorded(None, HEADER, {}), capacity=1 << 30)
    assert decision == Continue(replace(HEADER, capacity=1 << 30), is_sealed=False, dropped=FOR_MEMORY)


@pytest.mark.parametrize(
    "recorded", [Recorded(None, HEADER, {}), Recorded(SEAL, None, ALL_THERE)], ids=["begun", "done"]
)
def test_another_job_is_refused_unless_it_is_to_begin_anew(recorded: Recorded) -> None:
    decision = decided(recorded, identity=OTHER)
    assert isinstance(decision, Refuse)
    assert "/d/out.jsonl.journal belongs to another job: --dtype was bf16, is int8" in decision.message
    assert isinstance(decided(recorded, identity=OTHER, is_fresh=True), Start)
    elsewhere = decided(recorded, paths=replace(PATHS, errors=Path("/d/bad.jsonl")))
    assert isinstance(elsewhere, Refuse)


def test_a_finished_job_is_done() -> None:
    assert decided(Recorded(SEAL, None, ALL_THERE)) == Done({"num_lines": 10})
    assert decided(Recorded(replace(SEAL, is_ordered=True), None, ALL_THERE), is_ordered=True) == Done(
        {"num_lines": 10}
    )


def test_a_finished_job_in_another_order_is_refused() -> None:
    decision = decided(Recorded(SEAL, None, ALL_THERE), is_ordered=True)
    assert isinstance(decision, Refuse)
    assert "in the order in which lines finished; run again with --ordered --fresh" in decision.message


def test_a_finished_job_whose_files_were_changed_is_refused() -> None:
    seal = replace(SEAL, file_sizes={"out.jsonl": 500, "out.errors.jsonl": 9})
    decision = decided(Recorded(seal, None, {"out.jsonl": 500, "out.errors.jsonl": 8}))
    assert isinstance(decision, Refuse)
    assert "/d/out.errors.jsonl was changed since" in decision.message
    assert isinstance(decided(Recorded(seal, None, ALL_THERE)), Done)  # without its error file it is still complete


def test_a_finished_job_whose_output_is_gone_begins_anew() -> None:
    """Its error file, where it still stands, is its own."""
    seal = replace(SEAL, file_sizes={"out.jsonl": 500, "out.errors.jsonl": 9})
    recorded = Recorded(seal, HEADER, {"out.errors.jsonl": 9})
    assert decided(recorded) == Start({"out.jsonl": [500], "out.errors.jsonl": [9]})
    assert isinstance(decided(Recorded(seal, HEADER, {"out.errors.jsonl": 10})), Refuse)


def test_a_finished_job_with_lines_for_more_memory_is_unsealed_by_more() -> None:
    recorded = Recorded(RETRIABLE, HEADER, ALL_THERE)
    assert decided(recorded) == Done({"num_lines": 10})
    own = replace(HEADER, own_sizes={"out.jsonl": [500]}, capacity=1 << 30)
    assert decided(recorded, capacity=1 << 30) == Continue(own, is_sealed=True, dropped=FOR_MEMORY)
    assert decided(Recorded(SEAL, None, ALL_THERE), capacity=1 << 30) == Done({"num_lines": 10})

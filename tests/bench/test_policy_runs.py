"""The bench of policies without an engine: what is done again, what is kept, and tables that add up."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import policies
import pytest
import run_store
from policies import Cell, Outcome, Setting
from run_store import Progress, RunStore

SETTING = Setting("library", "int8", "64MiB", 0.05)


def summary(seconds: float, *, cached: int = 30, computed: int = 70) -> dict[str, Any]:
    """What `blendserve run --json` prints."""
    return {
        "makespan_s": seconds + 1,
        "load_s": 1.0,
        "num_cached_tokens": cached,
        "num_prompt_tokens": 100,
        "num_prefill_tokens": computed,
        "scheduling_share": 0.01,
        "balance": 0.87,
        "num_preemptions": 0,
        "num_steps": 7,
        "calibration": "thorough",
    }


def outcome(seconds: float, **tokens: int) -> Outcome:
    return policies.outcome_of(summary(seconds, **tokens), 0.4, 0.1, token_s=0.05)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs.jsonl", code="a", on_machine="m")


def test_runs_come_back_for_the_same_code_and_machine_only(store: RunStore, tmp_path: Path) -> None:
    cell = Cell(SETTING, "dfs/off")
    store.add(cell.key(), asdict(outcome(2.0)))
    path = tmp_path / "runs.jsonl"
    assert [run["elapsed_s"] for run in RunStore(path, code="a", on_machine="m").runs(cell.key())] == [2.0]
    assert not RunStore(path, code="b", on_machine="m").runs(cell.key())
    assert not RunStore(path, code="a", on_machine="other").runs(cell.key())
    assert not store.runs(Cell(SETTING._replace(scale=1.0), "dfs/off").key())


def test_a_torn_line_is_cut_off(store: RunStore, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    store.add({"n": 1}, {"elapsed_s": 1.0})
    with path.open("a") as file:
        file.write('{"cell": {"n": 2}, "fou')
    again = RunStore(path, code="a", on_machine="m")
    again.add({"n": 3}, {"elapsed_s": 3.0})
    last = RunStore(path, code="a", on_machine="m")
    assert [len(last.runs({"n": number})) for number in (1, 2, 3)] == [1, 0, 1]


def test_other_code_has_another_name(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "a.cpp"
    source.write_text("1")
    before = run_store.code_hash(tmp_path)
    source.write_text("2")
    assert run_store.code_hash(tmp_path) != before


def test_every_entrant_runs_once_before_any_is_repeated(store: RunStore) -> None:
    store.add(Cell(SETTING, "b").key(), asdict(outcome(1.0)))
    todo = policies.missing([SETTING], ["a", "b"], 2, store)
    assert [cell.entrant for cell in todo] == ["a", "b", "a"]


def test_a_stopped_bench_goes_on(store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(cell: Cell, batch_file: Path, most_sharing: float) -> Outcome:
        assert batch_file.is_file()
        assert 0 < most_sharing < 1
        if len(ran) == 1 and cell.entrant == "c":
            raise KeyboardInterrupt
        ran.append(cell.entrant)
        return outcome(1.0)

    monkeypatch.setattr(policies, "_run", run)
    arguments = argparse.Namespace(minutes=1.0, repeats=1, questions=None)
    with pytest.raises(KeyboardInterrupt):
        policies.run_missing([SETTING], ["a", "c"], store, arguments)
    ran.append("stopped")
    again = RunStore(tmp_path / "runs.jsonl", code="a", on_machine="m")
    policies.run_missing([SETTING], ["a", "c"], again, arguments)
    assert ran == ["a", "stopped", "c"]
    assert list(policies.stored(SETTING, ["a", "c", "d"], again)) == ["a", "c"]


def test_no_run_begins_that_would_end_too_late(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(Cell(SETTING, "a").key(), asdict(outcome(100.0)))
    monkeypatch.setattr(policies, "_run", lambda *_: pytest.fail("a run of 100 s in one minute"))
    policies.run_missing([SETTING], ["a", "b"], store, argparse.Namespace(minutes=1.0, repeats=1, questions=None))


def test_the_rest_takes_as_long_as_runs_so_far() -> None:
    progress = Progress([], 3)
    assert str(progress) == "3 runs left"
    progress.done(60.0)
    progress.done(120.0)
    assert str(progress) == "1 runs left, about 1.5 minutes"


def test_speedups_are_over_both_baselines() -> None:
    found = {"fcfs/off": [outcome(9.0)], "dfs/off": [outcome(7.5)], "blend/on": [outcome(6.0)]}
    row = policies.table(found).splitlines()[-1]
    for text in ("1.50 (1.50..1.50)x", "1.25 (1.25..1.25)x", "75.0%", "0.87", "10%", "thorough"):
        assert text in row


def test_what_is_saved_adds_up() -> None:
    """`dfs` computed 40 tokens again and shared 10 less; a token costs 0.05 s."""
    found = {
        "dfs/off": [outcome(10.0, cached=20, computed=120)],
        "blend/off": [outcome(7.0, cached=30, computed=70)],
        "blend/on": [outcome(5.0, cached=30, computed=70)],
    }
    rows = policies.gains(found).splitlines()[2:]
    figures = [[float(cell) for cell in row.split("|")[2:-1]] for row in rows]
    assert figures == [[0, 0, 0, 0, 0], [3, 0, 2, 0.5, 0.5], [5, 2, 2, 0.5, 0.5]]

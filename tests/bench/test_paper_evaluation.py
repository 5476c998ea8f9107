"""The paper's evaluation in miniature: every experiment's cells exist, run, and become a page with plots."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import paper
import paper_store
import pytest
from paper_ablation import ABLATIONS, AverageLoad
from paper_causes import losses_section, replicas_section, sensitivity_section
from paper_cells import COARSE_GRID, all_cells
from paper_run import Cell, Outcome, make_machine, run_cell
from paper_sections import traces_section
from paper_store import CellStore, code_hash
from paper_variants import VARIANTS
from planner_cases import plan_of

from blendserve.planner.policies import make_policy
from blendserve.simulator.losses import LOSSES

SCALE = 0.03


def small(cell: Cell) -> Outcome:
    """The cell at a scale where it takes a second: videos are then so short that no blend is less dense than this."""
    outcome = run_cell(replace(cell, density=6.0, sharing=0.1), SCALE)
    assert isinstance(outcome, Outcome)
    return outcome


def test_every_table_of_the_evaluation_has_cells() -> None:
    full = all_cells(is_quick=False)
    assert {cell.experiment for cell in full} == set(paper.SECTIONS)
    grid = {(cell.density, cell.sharing) for cell in full if cell.experiment == "grid BurstGPT"}
    assert len(grid) == 65
    coarse = {
        (cell.density, cell.sharing)
        for cell in all_cells(is_quick=False, is_coarse=True)
        if cell.experiment == "grid BurstGPT"
    }
    assert len(coarse) == len(COARSE_GRID[0]) * len(COARSE_GRID[1])
    assert coarse <= grid
    assert {cell.experiment for cell in all_cells(is_quick=True)} <= set(paper.SECTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_blend_serves_everything_with_any_ingredient_out(ablation: str) -> None:
    outcome = small(Cell("ablation", "blend", 0, 0, ablation=ablation))
    assert 0 < outcome.share_of_bound <= 1


def test_a_blend_that_cannot_be_is_told_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [Cell("grid BurstGPT", "blend", 0.0001, 0.4)]
    assert "density" in str(run_cell(cells[0], SCALE))
    store = CellStore(tmp_path / "cells.jsonl", SCALE)
    assert list(paper.run_all(cells, SCALE, 1, store)) == []
    assert "left out" in capsys.readouterr().err
    assert CellStore(tmp_path / "cells.jsonl", SCALE).missing(cells) == []


def outcome_of(cell: Cell, time_s: float) -> Outcome:
    return Outcome(
        cell, 1, time_s, 1.0, 1.0, 0.9, 0.9, 0.2, 0.1, 3, 0, 0.5, lower_bound_s=0.5, steps={"time_s": [time_s]}
    )


def test_what_is_done_is_kept_over_an_interruption(tmp_path: Path) -> None:
    cells = [Cell("traces 8B", "blend", density, 0.1) for density in (1.0, 1.1, 1.2)]
    path = tmp_path / "cells.jsonl"
    store = CellStore(path, 1.0)
    for number, cell in enumerate(cells[:2]):
        store.add(cell, outcome_of(cell, 1.0 + number))
    with path.open("ab") as file:
        file.write(b'{"scale": 1.0, "co')  # killed while it wrote
    again = CellStore(path, 1.0)
    assert [cell.density for cell in again.missing(cells)] == [1.2]
    assert [again[cell] for cell in cells[:2]] == [
        outcome_of(cell, 1.0 + number) for number, cell in enumerate(cells[:2])
    ]
    again.add(cells[2], outcome_of(cells[2], 3.0))
    assert list(paper.run_all(cells, 1.0, 1, CellStore(path, 1.0))) == [again[cell] for cell in cells]
    assert len(CellStore(path, 0.1).missing(cells)) == 3
    assert len(CellStore(path, 1.0, code_of=lambda _: "another").missing(cells)) == 3


def test_tables_share_simulations(tmp_path: Path) -> None:
    cell = Cell("traces 8B", "blend", 1.0, 0.1, label="a")
    same = replace(cell, experiment="replicas", label="b")
    store = CellStore(tmp_path / "cells.jsonl", 1.0)
    store.add(cell, outcome_of(cell, 1.0))
    assert store.missing([cell, same]) == []
    assert store[same] == outcome_of(same, 1.0)
    assert len(store.missing([replace(cell, num_replicas=2), replace(cell, knowledge="exact")])) == 2


def test_a_simulation_is_named_by_the_code_that_it_runs_through(tmp_path: Path) -> None:
    names = ("planner/order.py", "planner/blend.py", "planner/deal.py", "engine/grammar.py", "costs/hardware.py")
    for name in (*(f"src/blendserve/{name}" for name in names), "bench/paper_run.py", "bench/paper_variants.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('"""What it is."""\nvalue = 1\n')
    blend, dfs = Cell("", "blend", 1.0, 0.1), Cell("", "NanoFlow-DFS", 1.0, 0.1)
    cells = {"blend": blend, "dfs": dfs, "two": replace(dfs, num_replicas=2), "variant": replace(dfs, variant="a")}

    def changed_by(name: str, text: str) -> set[str]:
        path, clear_cached_hashes = tmp_path / name, paper_store.acting_hash.cache_clear
        before, old = {key: code_hash(cell, tmp_path) for key, cell in cells.items()}, path.read_text()
        path.write_text(text)
        clear_cached_hashes()
        after = {key: code_hash(cell, tmp_path) for key, cell in cells.items()}
        path.write_text(old)
        clear_cached_hashes()
        return {key for key in cells if before[key] != after[key]}

    assert changed_by("src/blendserve/planner/order.py", "value = 2") == set(cells)
    assert changed_by("src/blendserve/costs/hardware.py", "value = 2") == set(cells)
    assert changed_by("src/blendserve/planner/blend.py", "value = 2") == {"blend"}
    assert changed_by("src/blendserve/planner/deal.py", "value = 2") == {"two"}
    assert changed_by("bench/paper_variants.py", "value = 2") == {"variant"}
    assert changed_by("src/blendserve/engine/grammar.py", "value = 2") == set()
    assert changed_by("src/blendserve/planner/order.py", '"""Other words."""\nvalue = 1  # and a comment\n') == set()


def test_other_words_in_an_error_leave_a_simulation_valid(tmp_path: Path) -> None:
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    for path, text in ((first, "too small"), (second, "too little")):
        path.write_text(f"def check(x):\n    if x < 1:\n        raise ValueError('{text}')\n")
    assert paper_store.acting_hash(first) == paper_store.acting_hash(second)
    second.write_text(first.read_text().replace("x < 1", "x < 2"))
    paper_store.acting_hash.cache_clear()
    assert paper_store.acting_hash(first) != paper_store.acting_hash(second)


def test_every_variant_changes_the_machine_or_the_policy() -> None:
    plain = make_machine(Cell("sensitivity", "blend", 1.0, 0.1), 1.0, "overlapped")
    same = [
        name
        for name in VARIANTS
        if make_machine(Cell("sensitivity", "blend", 1.0, 0.1, variant=name), 1.0, "overlapped") == plain
    ]
    assert same == ["least recently used is evicted", "prefixes are kept only while in use"]
    policy = VARIANTS["prefixes are kept only while in use"].policy(make_policy("random", plan_of([(1,)], (1,))))
    assert policy.next_use(0) == float("inf")


def test_rows_wait_for_all_of_their_cells(tmp_path: Path) -> None:
    cells = [cell for cell in all_cells(is_quick=False) if cell.experiment in ("replicas", "sensitivity")]
    store = CellStore(tmp_path / "cells.jsonl", 1.0)
    done = [cell for cell in cells if cell.label == "trace-1" and cell.num_replicas in (1, 4)]
    missing = next(cell for cell in done if cell.variant == "batch of 512 tokens")
    for number, cell in enumerate(cell for cell in done if cell != missing):
        values = dict.fromkeys(LOSSES, 1.0)
        store.add(cell, replace(outcome_of(cell, 1.0 + number), losses_s=values, replica_s=[1.0]))
    rows = paper.rows_done(cells, store)
    assert {cell.num_replicas for cell in rows if cell.experiment == "replicas"} == {1, 4}
    assert missing.variant not in {cell.variant for cell in rows}
    outcomes = list(paper.done_of(rows, store))
    replicas = replicas_section([one for one in outcomes if one.cell.experiment == "replicas"], tmp_path)
    assert [line.split("|")[2].strip() for line in replicas if line.startswith("| trace-1")] == ["4"]
    assert replicas_section([one for one in outcomes if one.cell.num_replicas == 4], tmp_path) == []
    table = sensitivity_section([one for one in outcomes if one.cell.experiment == "sensitivity"], tmp_path)
    assert sum(line.startswith("|") for line in table) == 2 + len(VARIANTS)


def test_shares_of_the_time_beyond_the_bound_add_up(tmp_path: Path) -> None:
    cell = Cell("losses", "blend", 1.0, 0.1, label="trace-1")
    run = replace(outcome_of(cell, 20.0), lower_bound_s=13.0, losses_s=dict.fromkeys(LOSSES, 1.0))
    exact = replace(run, cell=replace(cell, knowledge="exact"), time_s=19.0)
    row = next(line for line in losses_section([run, exact], tmp_path) if line.startswith("| trace-1"))
    values = [float(value) for value in row.split("|")[2:-1]]
    assert sum(values[:7]) == pytest.approx(values[7]) == pytest.approx(35.0)
    assert values[8] == pytest.approx(5.0)


@pytest.mark.slow
def test_outcomes_become_sections_a_table_and_plots(tmp_path: Path) -> None:
    cells = [cell for cell in all_cells(is_quick=True) if cell.experiment == "traces 8B" and cell.label == "trace-1"]
    outcomes = [small(cell) for cell in cells]
    page = traces_section(outcomes, tmp_path)
    assert sum(line.startswith("| trace-1 |") for line in page) == len(cells) == 5
    assert (tmp_path / "traces_llama_3_8b.svg").read_text().startswith("<svg")
    store = CellStore(tmp_path / "cells.jsonl", SCALE)
    for outcome in outcomes:
        store.add(outcome.cell, outcome)
    paper.write_csv(tmp_path / "cells.csv", outcomes, store)
    rows = list(csv.DictReader((tmp_path / "cells.csv").read_text().splitlines()))
    assert [float(row["time_s"]) for row in rows] == [outcome.time_s for outcome in outcomes]


def test_average_load_counts_half_of_what_is_to_come() -> None:
    load = AverageLoad()
    load.rebuild(0, np.array([10.0]), np.array([[100.0]]))
    assert load.fits(0, 0, 10.0, np.array([60.0]), 100.0)
    load.add(0, 10.0, np.array([60.0]))
    assert not load.fits(1, 0, 1.0, np.array([1.0]), 100.0)

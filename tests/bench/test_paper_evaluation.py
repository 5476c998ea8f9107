"""The paper's evaluation in miniature: every experiment's cells exist, run, and become a page with plots."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import paper
import pytest
from paper_ablation import ABLATIONS, AverageLoad
from paper_cells import COARSE_GRID, Cell, Outcome, all_cells, run_cell
from paper_store import CellStore, code_hash

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
    return Outcome(cell, 1, time_s, 1.0, 1.0, 0.9, 0.9, 0.2, 0.1, 3, 0, 0.5, {"time_s": [time_s]})


def test_what_is_done_is_kept_over_an_interruption(tmp_path: Path) -> None:
    cells = [Cell("traces 8B", "blend", 1.0, 0.1, label=label) for label in "abc"]
    path = tmp_path / "cells.jsonl"
    store = CellStore(path, 1.0)
    for number, cell in enumerate(cells[:2]):
        store.add(cell, outcome_of(cell, 1.0 + number))
    with path.open("ab") as file:
        file.write(b'{"scale": 1.0, "co')  # killed while it wrote
    again = CellStore(path, 1.0)
    assert again.missing(cells) == cells[2:]
    assert [again[cell] for cell in cells[:2]] == [
        outcome_of(cell, 1.0 + number) for number, cell in enumerate(cells[:2])
    ]
    again.add(cells[2], outcome_of(cells[2], 3.0))
    assert list(paper.run_all(cells, 1.0, 1, CellStore(path, 1.0))) == [again[cell] for cell in cells]
    assert CellStore(path, 0.1).missing(cells) == cells
    assert CellStore(path, 1.0, code="another").missing(cells) == cells


def test_the_code_of_a_simulation_is_named_by_all_that_it_depends_on(tmp_path: Path) -> None:
    for place in ("planner", "simulator", "costs", "engine"):
        (tmp_path / "src/blendserve" / place).mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    for name in ("bench/paper_cells.py", "bench/paper_ablation.py", "src/blendserve/planner/order.py"):
        (tmp_path / name).write_text("1")
    before = code_hash(tmp_path)
    (tmp_path / "src/blendserve/planner/order.py").write_text("2")
    assert code_hash(tmp_path) != before


@pytest.mark.slow
def test_outcomes_become_sections_a_table_and_plots(tmp_path: Path) -> None:
    cells = [cell for cell in all_cells(is_quick=True) if cell.experiment == "traces 8B" and cell.label == "trace-1"]
    outcomes = [small(cell) for cell in cells]
    page = paper.traces_section(outcomes, tmp_path)
    assert sum(line.startswith("| trace-1 |") for line in page) == len(cells) == 5
    assert (tmp_path / "traces_llama_3_8b.svg").read_text().startswith("<svg")
    paper.write_csv(tmp_path / "cells.csv", outcomes)
    rows = list(csv.DictReader((tmp_path / "cells.csv").read_text().splitlines()))
    assert [float(row["time_s"]) for row in rows] == [outcome.time_s for outcome in outcomes]


def test_average_load_counts_half_of_what_is_to_come() -> None:
    load = AverageLoad()
    load.rebuild(0, np.array([10.0]), np.array([[100.0]]))
    assert load.fits(0, 0, 10.0, np.array([60.0]), 100.0)
    load.add(0, 10.0, np.array([60.0]))
    assert not load.fits(1, 0, 1.0, np.array([1.0]), 100.0)

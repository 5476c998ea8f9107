"""Regenerates the paper's evaluation on the simulator: csv, a markdown page beside the paper's numbers, and plots.

    python bench/paper.py [--full] [--quick] [--coarse] [--scale S] [--jobs N] [--only EXPERIMENTS] [--out DIRECTORY]

All figures are simulated. `--full` is the evaluation: everything at the paper's own size, 400,000 requests a job. It
takes a night on two cores. Interrupt it as you like: the same command goes on with the simulations that are missing.

Other runs are small, and their figures lower: ramp and tail weigh more in a small job. A run at scale S has S^2 of the
requests, videos of S of the length and a GPU with S of the KV memory, batch and step constants, which keeps the ratio
of the longest request to the whole job. `--quick` is what CI runs.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

from common import machine
from paper_causes import losses_section, replicas_section, sensitivity_section
from paper_cells import all_cells
from paper_run import PAPER_REQUESTS, Cell, Outcome, run_cell
from paper_sections import (
    ablation_section,
    disaggregated_section,
    grid_section,
    knowledge_section,
    models_section,
    timeline_section,
    traces_section,
)
from paper_store import CellStore
from paper_tables import grouped, splits_section, table, table_1, table_4

from blendserve.simulator.workloads.blend import PAPER_TRACES

DEFAULT_SCALE = 0.1
"""The least at which all blends exist: below it videos are so short that density 0.9 needs nothing else."""
Section = Callable[[list[Outcome], Path], list[str]]


SECTIONS: dict[str, Section] = {
    "traces 8B": traces_section,
    "traces 70B": traces_section,
    "timeline": timeline_section,
    "grid BurstGPT": grid_section,
    "grid Azure": grid_section,
    "grid ShareGPT": grid_section,
    "grid WildChat": grid_section,
    "knowledge": knowledge_section,
    "ablation": ablation_section,
    "models": models_section,
    "disaggregated": disaggregated_section,
    "replicas": replicas_section,
    "losses": losses_section,
    "sensitivity": sensitivity_section,
}


def write_csv(path: Path, outcomes: Iterable[Outcome], store: CellStore) -> list[Outcome]:
    """Every cell's figures and the commit that they are of, one row each, written as they come. Returns them."""
    figures = [field.name for field in fields(Outcome) if field.name not in ("cell", "steps")]
    keys = [field.name for field in fields(Cell) if field.name != "keeps_steps"]
    written = []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, *figures, "commit"])
        for one in outcomes:
            values = [*(getattr(one.cell, key) for key in keys), *(getattr(one, name) for name in figures)]
            writer.writerow([*values, store.commit_of(one.cell)])
            file.flush()
            written.append(one)
    return written


def run_all(cells: list[Cell], scale: float, num_jobs: int, store: CellStore) -> Iterator[Outcome]:
    """All cells that can be, in their order; those that the store does not have are simulated first, in parallel."""
    missing = store.missing(cells)
    began = time.perf_counter()
    if missing:
        print(f"{len(missing)} simulations to do, at scale {scale:g}", file=sys.stderr)
        with multiprocessing.get_context("spawn").Pool(num_jobs) as pool:
            done = pool.imap_unordered(partial(_numbered, cells=missing, scale=scale), range(len(missing)))
            for count, (number, outcome) in enumerate(done, start=1):
                store.add(missing[number], outcome)
                left_s = (time.perf_counter() - began) / count * (len(missing) - count)
                cell = missing[number]
                what = f"{cell.system}, {cell.trace} {cell.density:g} {cell.sharing:.0%}, {cell.model}"
                print(f"{count}/{len(missing)}, about {left_s / 60:.0f} min left: {what}", file=sys.stderr, flush=True)
    yield from done_of(cells, store)


def done_of(cells: list[Cell], store: CellStore) -> Iterator[Outcome]:
    """Outcomes of those that the store has."""
    for cell in cells:
        outcome = store.get(cell)
        if isinstance(outcome, str):
            print(f"left out: {outcome}", file=sys.stderr)
        elif outcome is not None:
            yield outcome


def _numbered(number: int, cells: list[Cell], scale: float) -> tuple[int, Outcome | str]:
    return number, run_cell(cells[number], scale)


def rows_done(cells: list[Cell], store: CellStore) -> list[Cell]:
    """Cells of those rows of a table that can be made: all cells of the row are done."""

    def row(cell: Cell) -> tuple[object, ...]:
        count = cell.num_replicas if cell.num_replicas > 1 else 1
        return (cell.experiment, cell.label, cell.density, cell.sharing, cell.trace, cell.model, cell.variant, count)

    open_rows = {row(cell) for cell in cells if cell not in store}
    return [cell for cell in cells if row(cell) not in open_rows]


def make_page(outcomes: list[Outcome], scale: float, out: Path, notes: list[str]) -> list[str]:
    """Lines of the page. Writes: the plots."""
    page = [
        "# The paper's evaluation, simulated",
        "",
        f"Scale {scale:g}: {round(PAPER_REQUESTS * scale**2)} requests a job. All figures are simulated. T_o and T_lb: "
        "the optimum and the bound of docs/paper-map.md.",
        *([] if scale == 1 else ["", "These jobs are small: ramp and tail weigh more than at the paper's size."]),
        "",
        *notes,
        "",
        *table_1(),
        "## The blends",
        *table(
            ("trace", "density", "sharing"), [(name, each.density, each.sharing) for name, each in PAPER_TRACES.items()]
        ),
        *table_4(),
        *splits_section(scale),
    ]
    for experiment, group in grouped(outcomes, lambda outcome: outcome.cell.experiment).items():
        page += SECTIONS[str(experiment)](group, out)
    return page


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="everything at the paper's size; goes on where it was")
    parser.add_argument("--quick", action="store_true", help="the four traces and a timeline")
    parser.add_argument("--coarse", action="store_true", help="12 blends of the grid of 65")
    parser.add_argument("--done", action="store_true", help="simulate nothing: the page and the csv of what is done")
    parser.add_argument("--scale", type=float, help=f"default: {DEFAULT_SCALE}, 1 with --full")
    parser.add_argument("--only", default="", metavar="NAMES", help=f"of {', '.join(SECTIONS)}; with commas between")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one for each core")
    parser.add_argument("--out", type=Path, help="default: bench/results/paper at scale 1, else .../paper-small")
    arguments = parser.parse_args()
    arguments.scale = arguments.scale or (1.0 if arguments.full else DEFAULT_SCALE)
    arguments.out = arguments.out or Path("bench/results", "paper" if arguments.scale == 1 else "paper-small")
    arguments.chosen = arguments.only.split(",") if arguments.only else list(SECTIONS)
    if unknown := set(arguments.chosen) - SECTIONS.keys():
        parser.error(f"unknown experiments {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    every = all_cells(is_quick=arguments.quick, is_coarse=arguments.coarse)
    cells = [cell for cell in every if cell.experiment in arguments.chosen]
    store = CellStore(arguments.out / "cells.jsonl", arguments.scale)
    if not arguments.done:
        for _ in run_all(cells, arguments.scale, arguments.jobs, store):
            pass
    outcomes = write_csv(arguments.out / "cells.csv", done_of(cells, store), store)
    in_rows = list(done_of(rows_done(cells, store), store))
    commits = sorted({store.commit_of(outcome.cell) for outcome in outcomes})
    notes = [
        f"Command: `python {shlex.join(sys.argv)}`; simulated at commit {', '.join(commits)} on {machine()}.",
        "",
        f"{len(outcomes)} of {len(cells)} cells of these tables are simulated. Rows that miss one are left out.",
    ]
    page = make_page(in_rows, arguments.scale, arguments.out, notes)
    page.append(f"Made in {time.perf_counter() - began:.0f} s on {arguments.jobs} processes.")
    (arguments.out / "paper.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    main()

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
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import paper_reference as paper
from common import machine
from paper_ablation import ABLATIONS
from paper_cells import (
    KNOWLEDGE,
    PAPER_REQUESTS,
    SYSTEMS,
    Cell,
    Outcome,
    all_cells,
    make_machine,
    make_workload,
    run_cell,
)
from paper_plots import bars, heat_map, lines
from paper_store import CellStore

from blendserve.costs.hardware import A100_80G
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import gpu_step_cost
from blendserve.models.known import LLAMA_3_8B
from blendserve.simulator.simulate import plan_workload
from blendserve.simulator.workloads.blend import PAPER_TRACES, paper_cost_model
from blendserve.simulator.workloads.knowledge import EXACT
from blendserve.simulator.workloads.traces import make_trace
from blendserve.simulator.workloads.workload import mix

DEFAULT_SCALE = 0.1
"""The least at which all blends exist: below it videos are so short that density 0.9 needs nothing else."""
BASE, ALGORITHM_3, OURS = "NanoFlow-DFS", "BlendServe, Alg. 3", "blend"
MEANS = "means, no distributions"
Section = Callable[[list[Outcome], Path], list[str]]


def table(headers: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a markdown table."""
    names = list(headers)
    lines_of = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return [*lines_of, *("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows), ""]


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def by_system(outcomes: Iterable[Outcome]) -> dict[str, Outcome]:
    return {outcome.cell.system: outcome for outcome in outcomes}


def grouped(outcomes: list[Outcome], key: Callable[[Outcome], object]) -> dict[object, list[Outcome]]:
    groups: dict[object, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(key(outcome), []).append(outcome)
    return groups


def table_1() -> list[str]:
    """Step cost of one layer, against what the paper measured."""
    cost = gpu_step_cost(ModelCost.from_spec(LLAMA_3_8B), A100_80G)
    rows = [
        (batch, cost.compute_s(batch) / 32 * 1e3, gemm, cost.memory_s(batch * 1024) / 32 * 1e3, attention)
        for batch, (gemm, attention) in paper.TABLE_1.items()
    ]
    return [
        "## Table 1: ms per layer, Llama-3-8B on an A100, sequence 1024 (the calibration)",
        *table(("batch", "GEMM", "paper, measured", "attention", "paper, measured"), rows),
    ]


def table_4(num_requests: int = 100_000) -> list[str]:
    """Sharing and density of the fitted traces."""
    rows = []
    for name, (sharing, density) in paper.TABLE_4.items():
        workload = mix(name, [make_trace(name, num_requests, np.random.default_rng(0))], np.random.default_rng(0))
        rows.append((name, workload.sharing, sharing, workload.cost(paper_cost_model()).density, density))
    return [
        "## Table 4: the traces (fitted generators; WildChat is a synthetic stand-in)",
        *table(("trace", "sharing", "paper", "density", "paper"), rows),
    ]


def traces_section(outcomes: list[Outcome], out: Path) -> list[str]:
    """The four named blends on every system."""
    model = outcomes[0].cell.model
    rows, plot = [], {}
    for label, group in grouped(outcomes, lambda outcome: outcome.cell.label).items():
        systems = by_system(group)
        base = systems[BASE].time_s
        plot[str(label)] = {name: base / systems[name].time_s for name in SYSTEMS}
        for name in SYSTEMS:
            one = systems[name]
            shares = (one.share_of_optimum, one.share_of_bound, one.sharing_kept)
            rows.append((label, name, round(one.tokens_per_s), base / one.time_s, *shares, one.num_preemptions))
    name = model.replace("-", "_")
    (out / f"traces_{name}.svg").write_text(bars(f"Speed over NanoFlow-DFS, {model} (simulated)", "x", plot))
    ratios = {system: [group[system] for group in plot.values()] for system in SYSTEMS}
    over_vllm = [group[OURS] / group["vLLM-DFS"] for group in plot.values()]
    return [
        f"## The four traces, {model}",
        *table(
            ("trace", "system", "tokens/s", "over NanoFlow-DFS", "T_o / T", "T_lb / T", "sharing kept", "preemptions"),
            rows,
        ),
        f"Over NanoFlow-DFS: Alg. 3 {mean(ratios[ALGORITHM_3]):.3f}, blend {mean(ratios[OURS]):.3f} "
        f"(paper: {paper.TRACES_OVER_DFS if model == 'llama-3-8b' else paper.TRACES_OVER_DFS_70B}). "
        f"Blend over vLLM-DFS: {min(over_vllm):.3f} to {max(over_vllm):.3f} (paper: {paper.OVER_VLLM_DFS}).",
        f"Paper: BlendServe reaches {paper.OPTIMUM_BLEND[model]} of T_o, DFS {paper.OPTIMUM_DFS}; Balance against DFS: "
        + ", ".join(f"{trace} {verdict}" for trace, verdict in paper.BALANCE_OVER_DFS.items())
        + f"; sharing kept over 0.97, by Balance under 0.30. Table 3 has {paper.TABLE_3_TOKENS_PER_S} tokens/s "
        "for BlendServe: compare ratios, this cost model leaves out norms, sampling and launch gaps.",
        "",
    ]


def timeline_section(outcomes: list[Outcome], out: Path) -> list[str]:
    """Both resources over the run."""
    for outcome in outcomes:
        steps = outcome.steps
        title = f"Busy share of both resources, {outcome.cell.system}, {outcome.cell.label} (simulated)"
        columns = {"compute": steps["compute_s"], "memory": steps["memory_s"]}
        path = out / f"timeline_{outcome.cell.system.replace(' ', '_')}.svg"
        path.write_text(lines(title, "share", steps["time_s"], columns, x_label="seconds"))
    return ["## Compute and memory over time", "See timeline_*.svg.", ""]


def grid_section(outcomes: list[Outcome], out: Path) -> list[str]:
    """Speedups over a grid of densities and sharings."""
    experiment = outcomes[0].cell.experiment
    ours, theirs, bounds = {}, {}, {}
    for key, group in grouped(outcomes, lambda outcome: (outcome.cell.density, outcome.cell.sharing)).items():
        assert isinstance(key, tuple)
        systems = by_system(group)
        ours[key] = systems[BASE].time_s / systems[OURS].time_s
        theirs[key] = systems[BASE].time_s / systems[ALGORITHM_3].time_s
        bounds[key] = systems[OURS].share_of_bound
    densities = sorted({density for density, _ in ours})
    sharings = sorted({sharing for _, sharing in ours})
    cells = {(f"{sharing:.0%}", f"{density:.2f}"): ours[density, sharing] for density, sharing in ours}
    columns, rows_of = [f"{density:.2f}" for density in densities], [f"{sharing:.0%}" for sharing in sharings]
    path = out / f"{experiment.replace(' ', '_')}.svg"
    path.write_text(heat_map(f"blend over NanoFlow-DFS, {experiment} (simulated)", columns, rows_of, cells))
    rows = []
    for density in densities:
        keys = [(density, sharing) for sharing in sharings if (density, sharing) in ours]
        published = paper.GRID_BY_DENSITY.get(density, "") if experiment == "grid BurstGPT" else ""
        means = [mean(values[key] for key in keys) for values in (ours, theirs, bounds)]
        rows.append((f"{density:.2f}", *means, published))
    num_better = sum(ours[key] > theirs[key] for key in ours)
    return [
        f"## {experiment}: {len(ours)} blends",
        *table(("density", "blend over DFS", "Alg. 3 over DFS", "blend T_lb / T", "paper over DFS"), rows),
        f"blend {min(ours.values()):.3f} to {max(ours.values()):.3f}, mean {mean(ours.values()):.4f}; "
        f"Alg. 3 mean {mean(theirs.values()):.4f}; paper {paper.GRID_RANGE[experiment]}. blend beats Alg. 3 "
        f"in {num_better} of {len(ours)}; share of T_lb: mean {mean(bounds.values()):.3f}, "
        f"least {min(bounds.values()):.3f}.",
        "",
    ]


def knowledge_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """What it costs not to know output lengths."""
    rows = []
    for label, group in grouped(outcomes, lambda outcome: outcome.cell.label).items():
        time_by = {outcome.cell.knowledge: outcome.time_s for outcome in group}
        rows.append((label, *(time_by["exact"] / time_by[name] for name in KNOWLEDGE)))
    return [
        "## Speed by what is known of lengths, exact = 1 (blend)",
        *table(("blend", *KNOWLEDGE), rows),
        f"Paper: {paper.SAMPLING}.",
        "",
    ]


def ablation_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """Policy blend with one ingredient out."""
    by_label = grouped(outcomes, lambda outcome: outcome.cell.label)
    names = [*ABLATIONS, MEANS]
    times = {label: {outcome.cell.ablation or MEANS: outcome for outcome in group} for label, group in by_label.items()}
    rows = [
        (
            name,
            *(times[label]["blend"].time_s / times[label][name].time_s for label in by_label),
            *(times[label][name].sharing_kept for label in by_label),
            *(times[label][name].num_preemptions for label in by_label),
        )
        for name in names
    ]
    headers = [f"{what}, {label}" for what in ("speed", "sharing kept", "preemptions") for label in by_label]
    return ["## Policy blend with one ingredient out: speed, all of it = 1", *table(("blend", *headers), rows)]


def splits_section(scale: float) -> list[str]:
    """How many leaves leave their subtree, with exact lengths."""
    rows = []
    for name, target in PAPER_TRACES.items():
        cell = Cell("splits", "blend", target.density, target.sharing)
        plan = plan_workload(make_workload(cell, scale), make_machine(cell, scale, "overlapped"), EXACT)
        share = float(plan.schedule.leaf_order.is_split.mean())
        rows.append(
            (name, f"{share:.2%}", plan.planned_sharing / plan.optimal_sharing, plan.schedule.leaf_order.num_rounds)
        )
    return [
        "## Leaves split (paper: 0.1 to 1% of them, with 99% of the sharing kept)",
        *table(("trace", "leaves split", "sharing kept by the plan", "sorts"), rows),
    ]


def models_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """Other models."""
    rows: list[tuple[object, ...]] = []
    speedups: list[tuple[float, float]] = []
    for model, group in grouped(outcomes, lambda outcome: outcome.cell.model).items():
        for label, cells in grouped(group, lambda outcome: outcome.cell.label).items():
            systems = by_system(cells)
            base = systems[BASE].time_s
            ours = systems[OURS]
            ratios = (base / systems[ALGORITHM_3].time_s, base / ours.time_s)
            speedups.append(ratios)
            rows.append((model, label, *ratios, ours.share_of_optimum, ours.share_of_bound))
    means = [mean(column) for column in zip(*speedups, strict=True)]
    return [
        "## Other models (70B class on 8 A100s)",
        *table(("model", "trace", "Alg. 3 over DFS", "blend over DFS", "T_o / T", "T_lb / T"), rows),
        f"Mean: Alg. 3 {means[0]:.3f}, blend {means[1]:.3f}; paper {paper.MODELS_OVER_DFS}.",
        "",
    ]


def disaggregated_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """xPyD per GPU against vLLM."""
    rows, names = [], ("1P1D", "1P2D", "2P1D", "1P3D")
    for label, group in grouped(outcomes, lambda outcome: outcome.cell.label).items():
        systems = by_system(group)
        base = systems["vLLM-DFS"].tokens_per_s_per_gpu
        rows.append((label, *(systems[name].tokens_per_s_per_gpu / base for name in names)))
    return [
        "## Prefill and decode on separate GPUs: throughput per GPU, vLLM-DFS = 1",
        *table(("trace", *names), rows),
        f"Paper: {paper.DISAGGREGATED}. Optimistic for it: free transfers, full prefill batches, decodes never wait.",
        "",
    ]


def replicas_section(outcomes: list[Outcome], out: Path) -> list[str]:  # noqa: ARG001
    """Data parallelism on one job."""
    rows = []
    for label, group in grouped(outcomes, lambda outcome: outcome.cell.label).items():
        time_by = {outcome.cell.num_replicas: outcome.time_s for outcome in group}
        kept = {outcome.cell.num_replicas: outcome.sharing_kept for outcome in group}
        speedups = [time_by[1] / time_by[count] for count in (2, 4)]
        published = [paper.TABLE_3_SPEEDUP[str(label), count] for count in (2, 4)]
        rows.append((label, speedups[0], published[0], speedups[1], published[1], kept[4]))
    return [
        "## Table 3: data parallelism, the same job on more replicas (blend)",
        *table(("trace", "DP=2", "paper", "DP=4", "paper", "sharing kept at 4"), rows),
    ]


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
}


def write_csv(path: Path, outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Every cell's figures, one row each, written as they come. Returns them."""
    figures = [field.name for field in fields(Outcome) if field.name not in ("cell", "steps")]
    keys = [field.name for field in fields(Cell) if field.name != "keeps_steps"]
    written = []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, *figures])
        for one in outcomes:
            writer.writerow([*(getattr(one.cell, key) for key in keys), *(getattr(one, name) for name in figures)])
            file.flush()
            written.append(one)
    return written


def run_all(cells: list[Cell], scale: float, num_jobs: int, store: CellStore) -> Iterator[Outcome]:
    """All cells that can be, in their order; those that the store does not have are simulated first, in parallel."""
    missing = store.missing(cells)
    began = time.perf_counter()
    if missing:
        with multiprocessing.get_context("spawn").Pool(num_jobs) as pool:
            done = pool.imap_unordered(partial(_numbered, cells=missing, scale=scale), range(len(missing)))
            for count, (number, outcome) in enumerate(done, start=1):
                store.add(missing[number], outcome)
                left_s = (time.perf_counter() - began) / count * (len(missing) - count)
                what = f"{missing[number].experiment}, {missing[number].system}"
                print(
                    f"{len(cells) - len(missing) + count}/{len(cells)}, about {left_s / 60:.0f} min left: {what}",
                    file=sys.stderr,
                )
    for cell in cells:
        outcome = store[cell]
        if isinstance(outcome, str):
            print(f"left out: {outcome}", file=sys.stderr)
        else:
            yield outcome


def _numbered(number: int, cells: list[Cell], scale: float) -> tuple[int, Outcome | str]:
    return number, run_cell(cells[number], scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="everything at the paper's size; goes on where it was")
    parser.add_argument("--quick", action="store_true", help="the four traces and a timeline")
    parser.add_argument("--coarse", action="store_true", help="12 blends of the grid of 65")
    parser.add_argument("--scale", type=float, help=f"default: {DEFAULT_SCALE}, 1 with --full")
    parser.add_argument("--only", default="", metavar="NAMES", help=f"of {', '.join(SECTIONS)}; with commas between")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: bench/results/paper with --full, else .../paper-small")
    arguments = parser.parse_args()
    scale = arguments.scale or (1.0 if arguments.full else DEFAULT_SCALE)
    arguments.out = arguments.out or Path("bench/results/paper" if arguments.full else "bench/results/paper-small")
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    chosen = arguments.only.split(",") if arguments.only else list(SECTIONS)
    if unknown := set(chosen) - SECTIONS.keys():
        parser.error(f"unknown experiments {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    cells = [
        cell for cell in all_cells(is_quick=arguments.quick, is_coarse=arguments.coarse) if cell.experiment in chosen
    ]
    store = CellStore(arguments.out / "cells.jsonl", scale)
    outcomes = write_csv(arguments.out / "cells.csv", run_all(cells, scale, arguments.jobs, store))
    page = [
        "# The paper's evaluation, simulated",
        "",
        f"Scale {scale:g}: {round(PAPER_REQUESTS * scale**2)} requests a job. All figures are simulated. T_o and T_lb: "
        "the optimum and the bound of docs/paper-map.md.",
        *([] if scale == 1 else ["", "These jobs are small: ramp and tail weigh more than at the paper's size."]),
        "",
        f"Command: `{' '.join(sys.argv)}`; simulated at commit {', '.join(sorted(store.commits))} on {machine()}.",
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
        page += SECTIONS[str(experiment)](group, arguments.out)
    page.append(f"{len(outcomes)} simulations in {time.perf_counter() - began:.0f} s on {arguments.jobs} processes.")
    (arguments.out / "paper.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    main()

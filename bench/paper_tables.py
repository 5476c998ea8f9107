"""Tables of `bench/paper.py` that need no simulated run, and what all of its tables are made with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import paper_reference as paper
from paper_run import Cell, Outcome, make_machine, make_workload

from blendserve.costs.hardware import A100_80G
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import gpu_step_cost
from blendserve.models.known import LLAMA_3_8B
from blendserve.simulator.simulate import plan_workload
from blendserve.simulator.workloads.blend import PAPER_TRACES, paper_cost_model
from blendserve.simulator.workloads.knowledge import EXACT
from blendserve.simulator.workloads.traces import make_trace
from blendserve.simulator.workloads.workload import mix

BASE, ALGORITHM_3, OURS = "NanoFlow-DFS", "BlendServe, Alg. 3", "blend"


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

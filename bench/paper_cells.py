"""What `bench/paper.py` simulates: one cell is one job on one system, and runs in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from paper_ablation import ABLATIONS

from blendserve.costs.hardware import A100_80G
from blendserve.errors import ConfigError
from blendserve.models.known import known_model
from blendserve.simulator.disaggregated import simulate_disaggregated
from blendserve.simulator.simulate import EngineKind, Machine, gpu_machine, simulate
from blendserve.simulator.workloads.blend import PAPER_TRACES, blend
from blendserve.simulator.workloads.knowledge import LengthKnowledge
from blendserve.simulator.workloads.traces import VIDEO_MEAN_TOKENS
from blendserve.simulator.workloads.workload import Workload

PAPER_REQUESTS = 400_000
SYSTEMS: dict[str, tuple[str, EngineKind]] = {
    "vLLM-DFS": ("dfs", "sequential"),
    "NanoFlow-Balance": ("random", "overlapped"),
    "NanoFlow-DFS": ("dfs", "overlapped"),
    "BlendServe, Alg. 3": ("paper", "overlapped"),
    "blend": ("blend", "overlapped"),
}
"""Baselines as policy and engine kind. vLLM-DFS and SGLang-DFS differ in nothing that the cost model knows."""
OWN_KNOWLEDGE = {("BlendServe, Alg. 3", "1% samples"): "means of samples"}
"""What a system makes of its samples where that is not what ours does: the paper's takes their means."""
GRID_DENSITIES = tuple(round(0.80 + 0.05 * step, 2) for step in range(13))
GRID_SHARINGS = (0.05, 0.15, 0.25, 0.35, 0.45)
COARSE_GRID = ((0.8, 1.0, 1.2, 1.4), (0.05, 0.25, 0.45))
TENSOR_PARALLEL = {"llama-3-70b": 8, "qwen-2.5-72b": 8, "deepseek-67b": 8}
SAMPLES = LengthKnowledge("sampled")
KNOWLEDGE = {
    "1% samples": SAMPLES,
    "means of samples": LengthKnowledge("means"),
    "exact": LengthKnowledge("exact"),
    "twice the truth": LengthKnowledge("scaled", factor=2.0),
    "half the truth": LengthKnowledge("scaled", factor=0.5),
    "twice or half by lot": LengthKnowledge("scattered", factor=2.0),
    "twice, never corrected": LengthKnowledge("scaled", factor=2.0, learns=False),
    "half, never corrected": LengthKnowledge("scaled", factor=0.5, learns=False),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One simulation. `experiment` names the table it goes to; `system` a key of SYSTEMS, or xPyD."""

    experiment: str
    system: str
    density: float
    sharing: float
    trace: str = "burstgpt"
    model: str = "llama-3-8b"
    num_replicas: int = 1
    knowledge: str = "1% samples"
    label: str = ""
    ablation: str = ""
    keeps_steps: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """A cell and its figures, all simulated. `steps`: mean of each column over slices of equal time."""

    cell: Cell
    num_requests: int
    time_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    share_of_optimum: float
    share_of_bound: float
    sharing: float
    sharing_kept: float
    num_steps: int
    num_preemptions: int
    wall_s: float
    steps: dict[str, list[float]] = field(default_factory=dict)


def make_workload(cell: Cell, scale: float, seed: int = 0) -> Workload:
    """The cell's blend at a scale: scale^2 of the paper's requests, videos of `scale` of the length."""
    num_requests = round(PAPER_REQUESTS * scale**2)
    return blend(
        cell.density,
        cell.sharing,
        num_requests,
        compute_trace=cell.trace,
        seed=seed,
        video_tokens=VIDEO_MEAN_TOKENS * scale,
    )


def make_machine(cell: Cell, scale: float, engine: EngineKind) -> Machine:
    """The cell's model on A100s, shrunk to the scale."""
    degree = TENSOR_PARALLEL.get(cell.model, 1)
    return gpu_machine(A100_80G, known_model(cell.model), engine=engine, tensor_parallel=degree).shrunk(scale)


def run_cell(cell: Cell, scale: float) -> Outcome | str:
    """Simulate one cell; what is wrong with it where so few requests do not come to its density and sharing.

    Requests that the KV memory of the model cannot hold at all are left out: the longest videos on Llama-2-7B.
    """
    try:
        workload = make_workload(cell, scale)
    except ConfigError as error:
        return str(error)
    if cell.system not in SYSTEMS:
        return _run_disaggregated(cell, workload, scale)
    policy, engine = SYSTEMS[cell.system]
    machine = make_machine(cell, scale, engine)
    workload = workload.subset(
        np.flatnonzero(workload.num_prompt_tokens + workload.num_output_tokens <= machine.capacity_tokens)
    )
    result = simulate(
        workload,
        machine,
        policy,
        engine=engine,
        num_replicas=cell.num_replicas,
        lengths=KNOWLEDGE[OWN_KNOWLEDGE.get((cell.system, cell.knowledge), cell.knowledge)],
        keeps_steps=cell.keeps_steps,
        make=ABLATIONS[cell.ablation] if cell.ablation else None,
    )
    return Outcome(
        cell=cell,
        num_requests=result.num_requests,
        time_s=result.time_s,
        tokens_per_s=result.tokens_per_s,
        tokens_per_s_per_gpu=result.tokens_per_s / result.num_gpus,
        share_of_optimum=result.share_of_optimum,
        share_of_bound=result.share_of_bound,
        sharing=result.sharing,
        sharing_kept=result.sharing_kept,
        num_steps=sum(replica.num_steps for replica in result.replicas),
        num_preemptions=sum(replica.num_preemptions for replica in result.replicas),
        wall_s=result.wall_s,
        steps=_slices(result.replicas[0].steps) if cell.keeps_steps else {},
    )


def _run_disaggregated(cell: Cell, workload: Workload, scale: float) -> Outcome:
    num_prefill, num_decode = int(cell.system[0]), int(cell.system[2])
    machine = make_machine(cell, scale, "sequential")
    result = simulate_disaggregated(workload, machine, num_prefill_gpus=num_prefill, num_decode_gpus=num_decode)
    num_gpus = num_prefill + num_decode
    return Outcome(
        cell=cell,
        num_requests=len(workload),
        time_s=result.time_s,
        tokens_per_s=result.tokens_per_s_per_gpu * num_gpus,
        tokens_per_s_per_gpu=result.tokens_per_s_per_gpu,
        share_of_optimum=float("nan"),
        share_of_bound=float("nan"),
        sharing=float("nan"),
        sharing_kept=float("nan"),
        num_steps=0,
        num_preemptions=0,
        wall_s=0.0,
    )


def _slices(steps: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]], count: int = 200) -> dict[str, list[float]]:
    """Busy shares of both resources and KV use over equal slices of the run's time."""
    edges = np.linspace(0, steps["end_s"][-1], count + 1)
    owner = np.clip(np.searchsorted(edges, steps["end_s"]) - 1, 0, count - 1)
    elapsed = np.maximum(np.bincount(owner, steps["elapsed_s"], count), 1e-12)
    weights = {name: steps[name] for name in ("compute_s", "memory_s")}
    weights["num_kv_tokens"] = steps["num_kv_tokens"] * steps["elapsed_s"]
    sums = {name: (np.bincount(owner, values, count) / elapsed).tolist() for name, values in weights.items()}
    return {"time_s": edges[1:].tolist(), **sums}


def all_cells(*, is_quick: bool, is_coarse: bool = False) -> list[Cell]:
    """Every cell of the run, long ones first within an experiment's list. A coarse run has 12 of the 65 blends."""
    if is_quick:
        return [*_traces("traces 8B"), *_timelines()]
    return [
        *_replicas(),
        *_traces("traces 70B", model="llama-3-70b"),
        *_traces("traces 8B"),
        *_timelines(),
        *_knowledge(2),
        *_ablations(),
        *_models(),
        *_disaggregated(),
        *_grid("grid BurstGPT", *(COARSE_GRID if is_coarse else (GRID_DENSITIES, GRID_SHARINGS))),
        *_grid("grid Azure", *COARSE_GRID, trace="azure-code"),
        *_grid("grid ShareGPT", *COARSE_GRID, trace="sharegpt"),
        *_grid("grid WildChat", COARSE_GRID[0], (0.25, 0.35, 0.45), trace="wildchat"),
    ]


def _named() -> Iterator[tuple[str, float, float]]:
    for name, target in PAPER_TRACES.items():
        yield name, target.density, target.sharing


def _traces(experiment: str, model: str = "llama-3-8b") -> Iterator[Cell]:
    for name, density, sharing in _named():
        for system in SYSTEMS:
            yield Cell(experiment, system, density, sharing, model=model, label=name)


def _timelines() -> Iterator[Cell]:
    for system in ("NanoFlow-DFS", "blend"):
        yield Cell("timeline", system, 1.4, 0.35, label="trace-1", keeps_steps=True)


def _grid(
    experiment: str, densities: tuple[float, ...], sharings: tuple[float, ...], trace: str = "burstgpt"
) -> Iterator[Cell]:
    for density in densities:
        for sharing in sharings:
            for system in ("NanoFlow-DFS", "BlendServe, Alg. 3", "blend"):
                yield Cell(experiment, system, density, sharing, trace=trace)


def _knowledge(num_traces: int) -> Iterator[Cell]:
    for name, density, sharing in list(_named())[:num_traces]:
        for knowledge in KNOWLEDGE:
            yield Cell("knowledge", "blend", density, sharing, knowledge=knowledge, label=name)
    for knowledge in KNOWLEDGE:
        yield Cell("knowledge", "blend", 1.1, 0.25, trace="sharegpt", knowledge=knowledge, label="ShareGPT (1.1, 25%)")


def _ablations() -> Iterator[Cell]:
    blends = (("burstgpt", "trace-2", 0.9, 0.35), ("sharegpt", "ShareGPT (1.1, 25%)", 1.1, 0.25))
    for trace, label, density, sharing in blends:
        for ablation in ABLATIONS:
            yield Cell("ablation", "blend", density, sharing, trace=trace, ablation=ablation, label=label)
        yield Cell("ablation", "blend", density, sharing, trace=trace, knowledge="means of samples", label=label)


def _models() -> Iterator[Cell]:
    for model in ("qwen-2.5-7b", "llama-2-7b", "qwen-2.5-72b", "deepseek-67b"):
        for name, density, sharing in _named():
            for system in ("NanoFlow-DFS", "BlendServe, Alg. 3", "blend"):
                yield Cell("models", system, density, sharing, model=model, label=name)


def _disaggregated() -> Iterator[Cell]:
    for name, density, sharing in _named():
        for system in ("vLLM-DFS", "1P1D", "1P2D", "2P1D", "1P3D"):
            yield Cell("disaggregated", system, density, sharing, label=name)


def _replicas() -> Iterator[Cell]:
    for name, density, sharing in _named():
        for num_replicas in (4, 2, 1):
            yield Cell("replicas", "blend", density, sharing, num_replicas=num_replicas, label=name)

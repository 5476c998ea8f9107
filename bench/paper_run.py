"""What `bench/paper.py` simulates: one cell is one job on one system, and runs in a process of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from paper_ablation import ABLATIONS
from paper_variants import VARIANTS

from blendserve.costs.hardware import A100_80G
from blendserve.errors import ConfigError
from blendserve.models.known import known_model
from blendserve.planner.base import Policy
from blendserve.planner.plan import Plan
from blendserve.planner.policies import make_policy
from blendserve.simulator.disaggregated import simulate_disaggregated
from blendserve.simulator.losses import losses_s
from blendserve.simulator.machine import EngineKind, Machine, gpu_machine
from blendserve.simulator.simulate import SimulationResult, simulate
from blendserve.simulator.workloads.blend import blend
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
    variant: str = ""
    keeps_steps: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """A cell and its figures, all simulated. `steps`: mean of each column over slices of equal time. `losses_s`: where
    the time beyond T_lb went, for one replica. `longest_output`: tokens of the longest answer."""

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
    longest_output: int = 0
    lower_bound_s: float = float("nan")
    losses_s: dict[str, float] = field(default_factory=dict)
    replica_s: list[float] = field(default_factory=list)
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
    """The cell's model on A100s, shrunk to the scale, with what a variant assumes."""
    degree = TENSOR_PARALLEL.get(cell.model, 1)
    machine = gpu_machine(A100_80G, known_model(cell.model), engine=engine, tensor_parallel=degree).shrunk(scale)
    return VARIANTS[cell.variant].machine(machine) if cell.variant else machine


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
    gc.disable()  # a simulation makes many small objects and no cycles of them: collections only take time
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
        keeps_steps=cell.num_replicas == 1,
        make=_maker(cell, policy),
    )
    return _outcome(cell, result, int(workload.num_output_tokens.max()))


def _maker(cell: Cell, policy: str) -> Callable[[Plan], Policy]:
    """How the cell's policy is made, with what an ablation or a variant changes in it."""

    def make(plan: Plan) -> Policy:
        made = ABLATIONS[cell.ablation](plan) if cell.ablation else make_policy(policy, plan)
        return VARIANTS[cell.variant].policy(made) if cell.variant else made

    return make


def _outcome(cell: Cell, result: SimulationResult, longest_output: int) -> Outcome:
    machine, steps = result.machine, result.replicas[0].steps
    is_one = cell.num_replicas == 1
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
        longest_output=longest_output,
        lower_bound_s=result.bounds.lower_bound_s,
        losses_s=losses_s(steps, result.bounds, machine.cost, machine.capacity_tokens, machine.overlap)
        if is_one
        else {},
        replica_s=[replica.time_s for replica in result.replicas],
        steps=_slices(steps) if cell.keeps_steps else {},
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

"""Policies on KV pools of several sizes, simulated on a 2-core machine: where a policy's time goes, and who is best.

    python bench/small_pool.py [--mixes pool,exam] [--kv-mib 128,256] [--policies dfs,paper,blend] [--details]

Mixes are those of `token_mixes.py`, rates those of `RATES`. Each mix runs on an engine whose steps take compute and
memory time one after the other (off), on one that hides half of the shorter one (on), and on one that does so without
the plan knowing (unplanned).

All figures are simulated.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from common import print_header, table
from token_mixes import MIXES, workload_of

from blendserve.config import BYTES_PER_WEIGHT, Dtype
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import SEQUENTIAL, Interference
from blendserve.costs.stored_calibration import Calibration
from blendserve.models.known import SMOLLM2_135M
from blendserve.planner.base import Policy
from blendserve.planner.plan import Plan
from blendserve.planner.policies import POLICY_NAMES, make_policy
from blendserve.simulator.machine import Machine
from blendserve.simulator.simulate import simulate
from blendserve.simulator.workloads.knowledge import SAMPLED
from blendserve.simulator.workloads.workload import Workload

INT8_RATES = Calibration(
    machine="2 cores of AMD EPYC (Zen 4)",
    dtype="int8",
    num_threads=2,
    gemm_flop_per_s=580e9,
    weight_bytes_per_s=30e9,
    kv_bytes_per_s=31e9,
    prefill_attention_flop_per_s=340e9,
    layer_constant_s=10e-6,
    loop_s=0.3e-3,
    compute_delay=1.0,
    memory_delay=1.0,
    memory_bytes=24.6e9,
)
RATES: dict[Dtype, Calibration] = {"int8": INT8_RATES, "bf16": replace(INT8_RATES, dtype="bf16", gemm_flop_per_s=400e9)}
"""By dtype of weights: what whole steps and attention reached there (docs/benchmarks.md)."""
INTERFERENCE = {"off": SEQUENTIAL, "on": Interference(0.5, 0.5), "unplanned": Interference(0.5, 0.5)}
"""Of the engine. Plans know of it but for `unplanned`: a run with overlap on a machine that was never measured."""
KV_MIB = (128, 256, 512, 1024, 4096)
MAX_NUM_SEQS = 256
SHORT_ANSWER_TOKENS = 32


def machine_of(kv_mib: int, overlap: str, dtype: Dtype = "int8") -> Machine:
    rates = RATES[dtype]
    model = ModelCost.from_spec(SMOLLM2_135M, bytes_per_weight=BYTES_PER_WEIGHT[dtype])
    return Machine(
        hardware=rates.hardware(),
        model=model,
        tensor_parallel=1,
        cost=replace(rates.step_cost(model), interference=INTERFERENCE[overlap]),
        capacity_tokens=int((kv_mib << 20) / model.kv_bytes_per_token),
        overlap=INTERFERENCE[overlap],
        max_num_seqs=MAX_NUM_SEQS,
    )


class Case(NamedTuple):
    """One simulated run."""

    mix: str
    kv_mib: int
    overlap: str
    policy: str
    dtype: Dtype = "int8"

    @property
    def setting(self) -> str:
        """What runs of different policies have in common."""
        return f"{self.mix} {self.dtype} {self.kv_mib} MiB {self.overlap}"


class Figures(NamedTuple):
    """Where the time of a run goes: `compute_s` + `memory_s` - `hidden_s` = `time_s`.

    Of the compute, `prompts_s` is for prompt tokens that were not found in the prefix cache and `recomputed_s` for what
    preemption had thrown away; the rest is decodes, prefill attention, and what steps cost that are not full.
    """

    case: Case
    time_s: float
    compute_s: float
    memory_s: float
    prompts_s: float
    recomputed_s: float
    num_steps: int
    num_preemptions: int
    sharing_kept: float

    @property
    def hidden_s(self) -> float:
        return self.compute_s + self.memory_s - self.time_s

    @property
    def other_s(self) -> float:
        return self.compute_s - self.prompts_s - self.recomputed_s


def without_lengths(workload: Workload) -> Workload:
    """The same where nothing is known of an output but `max_tokens`: 32 for short answers, else 1,024 or more."""
    outputs = workload.num_output_tokens
    limits = np.where(outputs > SHORT_ANSWER_TOKENS, np.maximum(1024, outputs), SHORT_ANSWER_TOKENS)
    return replace(workload, known_output_tokens=np.full(len(workload), -1), max_output_tokens=limits)


def unplanned_policy(name: str, plan: Plan) -> Policy:
    """A policy that does not know that the engine overlaps."""
    return make_policy(name, replace(plan, cost=replace(plan.cost, has_overlap=False)))


def figures_of(case: Case, seed: int = 0, scale: float = 1.0, *, are_known: bool = True) -> Figures:
    """Simulate one run. `are_known`: output lengths are known before; else only samples and what has finished."""
    workload, machine = workload_of(case.mix, seed, scale), machine_of(case.kv_mib, case.overlap, case.dtype)
    workload = workload if are_known else without_lengths(workload)
    result = simulate(
        workload,
        machine,
        case.policy,
        lengths=SAMPLED,
        make=partial(unplanned_policy, case.policy) if case.overlap == "unplanned" else None,
        keeps_steps=True,
        clock=lambda: 0.0,
    )
    (replica,) = result.replicas
    return Figures(
        case,
        result.time_s,
        float(replica.steps["compute_s"].sum()),
        float(replica.steps["memory_s"].sum()),
        machine.cost.token_s * (result.num_prompt_tokens - replica.num_cached_tokens),
        machine.cost.token_s * replica.num_recomputed_tokens,
        replica.num_steps,
        replica.num_preemptions,
        result.sharing_kept,
    )


def by_setting(found: Sequence[Figures]) -> dict[str, list[Figures]]:
    """Runs of the same mix, weights, memory and engine."""
    runs: dict[str, list[Figures]] = {}
    for figures in found:
        runs.setdefault(figures.case.setting, []).append(figures)
    return runs


def behind_best(runs: Sequence[Figures], policy: str = "blend") -> float:
    """How much longer the policy takes than the best of the others, as a share."""
    time_s = {figures.case.policy: figures.time_s for figures in runs}
    return time_s.pop(policy) / min(time_s.values()) - 1


def summary(found: Sequence[Figures], policies: Sequence[str]) -> str:
    """Seconds by policy, how far `blend` is from the best of the others, and its speed over engines without overlap."""
    apart = {(*f.case[:2], f.case.dtype, f.case.policy): f.time_s for f in found if f.case.overlap == "off"}
    rows = []
    for setting, runs in by_setting(found).items():
        by_policy = {figures.case.policy: figures for figures in runs}
        blend = by_policy.get("blend")
        behind = f"{behind_best(runs):+.1%}" if blend and len(runs) > 1 else ""
        over = []
        for name in ("dfs", "fcfs"):
            base_s = blend and apart.get((*blend.case[:2], blend.case.dtype, name))
            over.append(f"{base_s / blend.time_s:.2f}x" if blend and base_s else "")
        rows.append([setting, *(f"{by_policy[policy].time_s:.1f}" for policy in policies), behind, *over])
    header = ["mix, weights, KV memory, overlap", *policies, "blend over best", "over dfs/off", "over fcfs/off"]
    return table(header, rows)


def details(found: Sequence[Figures]) -> str:
    """Where the time goes, run by run."""
    rows = [
        [
            f"{setting} {figures.case.policy}",
            *(f"{value:.1f}" for value in (figures.time_s, figures.compute_s, figures.memory_s, figures.hidden_s)),
            str(figures.num_steps),
            str(figures.num_preemptions),
            f"{figures.sharing_kept:.2f}",
        ]
        for setting, runs in by_setting(found).items()
        for figures in runs
    ]
    return table(["run", "s", "compute s", "memory s", "hidden s", "steps", "preempted", "sharing kept"], rows)


def gains(found: Sequence[Figures], base: str = "dfs") -> str:
    """Seconds that each run saves over the base policy without overlap, and by what: the parts add up to the gain."""
    base_of = {(*f.case[:2], f.case.dtype): f for f in found if f.case[2:4] == ("off", base)}
    rows = []
    for figures in found:
        if (first := base_of.get((*figures.case[:2], figures.case.dtype))) is None:
            continue
        parts = (
            first.time_s - figures.time_s,
            figures.hidden_s - first.hidden_s,
            first.recomputed_s - figures.recomputed_s,
            first.prompts_s - figures.prompts_s,
            first.other_s - figures.other_s,
            first.memory_s - figures.memory_s,
        )
        rows.append([f"{figures.case.setting} {figures.case.policy}", *(f"{seconds:+.1f}" for seconds in parts)])
    header = [f"s saved over {base}, off", "all", "overlap", "preemption", "sharing", "fuller steps", "KV reads"]
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", default=",".join(MIXES))
    parser.add_argument("--kv-mib", default=",".join(map(str, KV_MIB)))
    parser.add_argument("--overlap", default="off,on", help="off, on, unplanned")
    parser.add_argument("--policies", default=",".join(POLICY_NAMES))
    parser.add_argument("--dtype", default="int8", help=f"of weights, comma-separated: {', '.join(RATES)} (int8)")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the requests, for a quick look")
    parser.add_argument("--unknown-lengths", action="store_true", help="nothing but max_tokens is known of outputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="simulations at once (1)")
    parser.add_argument(
        "--details", action="store_true", help="also print where the time of each run goes, and what it saves"
    )
    arguments = parser.parse_args()
    print_header()
    policies = arguments.policies.split(",")
    cases = [
        Case(mix, int(kv_mib), overlap, policy, dtype)
        for mix in arguments.mixes.split(",")
        for dtype in arguments.dtype.split(",")
        for kv_mib in arguments.kv_mib.split(",")
        for overlap in arguments.overlap.split(",")
        for policy in policies
    ]
    with multiprocessing.Pool(arguments.jobs) as workers:
        are_known = not arguments.unknown_lengths
        run = partial(figures_of, seed=arguments.seed, scale=arguments.scale, are_known=are_known)
        found = workers.map(run, cases, chunksize=1)
    print(summary(found, policies))
    if arguments.details:
        print("\n" + details(found))
        print("\n" + gains(found))


if __name__ == "__main__":
    main()

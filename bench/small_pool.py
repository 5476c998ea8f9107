"""Policies on KV pools of several sizes, simulated on a 2-core machine: where a policy's time goes, and who is best.

    python bench/small_pool.py [--mixes pool,exam] [--kv-mib 128,256] [--policies dfs,paper,blend] [--details]

Mixes are token counts: `pool` is a file of questions behind one long shared prefix, long generations and unshared long
prompts; the others have the shape of those in `mixes.py`. Rates are those of `RATES`. Each mix runs on an engine whose
steps take compute and memory time one after the other (off), and on one that hides half of the shorter one (on).

All figures are simulated.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from common import print_header, table

from blendserve.config import BYTES_PER_WEIGHT
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import SEQUENTIAL, Interference
from blendserve.costs.stored_calibration import Calibration
from blendserve.models.known import SMOLLM2_135M
from blendserve.planner.policies import POLICY_NAMES
from blendserve.simulator.machine import Machine
from blendserve.simulator.simulate import simulate
from blendserve.simulator.workloads.knowledge import SAMPLED
from blendserve.simulator.workloads.workload import Workload

RATES = Calibration(
    machine="2 cores of AMD EPYC (Zen 4)",
    dtype="int8",
    num_threads=2,
    gemm_flop_per_s=600e9,
    weight_bytes_per_s=25e9,
    kv_bytes_per_s=25e9,
    prefill_attention_flop_per_s=170e9,
    constant_s=0.33e-3,
    compute_delay=1.0,
    memory_delay=1.0,
    memory_bytes=24.6e9,
)
"""What `blendserve calibrate --dtype int8` measured there."""
INTERFERENCE = {"off": SEQUENTIAL, "on": Interference(0.5, 0.5)}
KV_MIB = (128, 256, 512, 1024, 4096)
MAX_NUM_SEQS = 256


class Part(NamedTuple):
    """Requests of one kind. `prefix` groups requests that share their first `num_prefix_tokens`; -1: nothing."""

    prompts: list[int]
    outputs: list[int]
    prefix: list[int]
    num_prefix_tokens: int = 0


def questions(rng: np.random.Generator, groups: int, per_group: int, prefix: int, own: int, answer: int) -> Part:
    count = groups * per_group
    own_tokens = rng.integers(own // 2, own * 3 // 2, count)
    groups_of = np.arange(count) // per_group
    return Part((prefix + own_tokens).tolist(), [answer] * count, groups_of.tolist(), prefix)


def alone(prompts: Sequence[int], outputs: Sequence[int]) -> Part:
    return Part(list(prompts), list(outputs), [-1] * len(prompts))


def pool(rng: np.random.Generator) -> list[Part]:
    return [
        questions(rng, 1, 160, 1040, 24, 6),
        alone([100] * 70, rng.integers(400, 1001, 70).tolist()),
        alone([1200] * 60, [24] * 60),
    ]


def generations(rng: np.random.Generator, count: int) -> Part:
    return alone([10] * count, rng.integers(160, 481, count).tolist())


def exam(rng: np.random.Generator) -> list[Part]:
    return [questions(rng, 57, 8, 480, 80, 2), generations(rng, 220)]


def digest(rng: np.random.Generator) -> list[Part]:
    return [generations(rng, 220), alone([1300] * 56, [16] * 56)]


def everything(rng: np.random.Generator) -> list[Part]:
    return [questions(rng, 38, 8, 480, 80, 2), generations(rng, 180), alone([1300] * 28, [16] * 28)]


MIXES: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    "pool": pool,
    "exam": exam,
    "digest": digest,
    "all": everything,
}
"""By name: parts, put end to end in the file but for `pool` and `all`, which are shuffled."""
SHUFFLED = ("pool", "all")


def workload_of(name: str, seed: int = 0) -> Workload:
    """A mix as a job whose output lengths are known, as they are where the end of sequence is ignored."""
    rng = np.random.default_rng(seed)
    parts = MIXES[name](rng)
    prompts, outputs, prefix = (
        np.concatenate([np.array(part[column], dtype=np.int64) for part in parts]) for column in range(3)
    )
    kind = np.repeat(np.arange(len(parts)), [len(part.prompts) for part in parts])
    shared = np.array([part.num_prefix_tokens for part in parts])[kind]
    rows = rng.permutation(len(kind)) if name in SHUFFLED else np.arange(len(kind))
    prompts, outputs, prefix, kind, shared = (column[rows] for column in (prompts, outputs, prefix, kind, shared))
    order = np.lexsort((prefix, kind))
    same = (kind[order[1:]] == kind[order[:-1]]) & (prefix[order[1:]] == prefix[order[:-1]]) & (prefix[order[1:]] >= 0)
    return Workload(
        name=name,
        num_prompt_tokens=prompts,
        num_output_tokens=outputs,
        known_output_tokens=outputs,
        kind=kind,
        kinds=tuple(str(number) for number in range(len(parts))),
        order=order,
        lcp=np.append(0, np.where(same, shared[order[1:]], 0)),
        max_output_tokens=outputs,
    )


def machine_of(kv_mib: int, overlap: str) -> Machine:
    model = ModelCost.from_spec(SMOLLM2_135M, bytes_per_weight=BYTES_PER_WEIGHT["int8"])
    return Machine(
        hardware=RATES.hardware(),
        model=model,
        tensor_parallel=1,
        cost=replace(RATES.step_cost(model), interference=INTERFERENCE[overlap]),
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


def figures_of(case: Case, seed: int = 0) -> Figures:
    workload, machine = workload_of(case.mix, seed), machine_of(case.kv_mib, case.overlap)
    result = simulate(
        workload,
        machine,
        case.policy,
        lengths=SAMPLED,
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


def by_setting(found: Sequence[Figures]) -> Iterator[tuple[str, list[Figures]]]:
    """Runs of the same mix, memory and engine, with a title."""
    settings = dict.fromkeys(figures.case[:3] for figures in found)
    for mix, kv_mib, overlap in settings:
        yield (
            f"{mix} {kv_mib} MiB {overlap}",
            [figures for figures in found if figures.case[:3] == (mix, kv_mib, overlap)],
        )


def summary(found: Sequence[Figures], policies: Sequence[str]) -> str:
    """Seconds by policy, and how far `blend` is from the best of the others."""
    rows = []
    for title, runs in by_setting(found):
        time_s = {figures.case.policy: figures.time_s for figures in runs}
        others = [seconds for policy, seconds in time_s.items() if policy != "blend"]
        behind = f"{time_s['blend'] / min(others) - 1:+.1%}" if others and "blend" in time_s else ""
        rows.append([title, *(f"{time_s[policy]:.1f}" for policy in policies), behind])
    return table(["mix, KV memory, overlap", *policies, "blend over best"], rows)


def details(found: Sequence[Figures]) -> str:
    """Where the time goes, run by run."""
    rows = [
        [
            f"{title} {figures.case.policy}",
            *(f"{value:.1f}" for value in (figures.time_s, figures.compute_s, figures.memory_s, figures.hidden_s)),
            str(figures.num_steps),
            str(figures.num_preemptions),
            f"{figures.sharing_kept:.2f}",
        ]
        for title, runs in by_setting(found)
        for figures in runs
    ]
    return table(["run", "s", "compute s", "memory s", "hidden s", "steps", "preempted", "sharing kept"], rows)


def gains(found: Sequence[Figures], base: str = "dfs") -> str:
    """Seconds that each run saves over the base policy without overlap, and by what: the parts add up to the gain."""
    base_of = {figures.case[:2]: figures for figures in found if figures.case[2:] == ("off", base)}
    rows = []
    for figures in found:
        if (first := base_of.get(figures.case[:2])) is None:
            continue
        parts = (
            first.time_s - figures.time_s,
            figures.hidden_s - first.hidden_s,
            first.recomputed_s - figures.recomputed_s,
            first.prompts_s - figures.prompts_s,
            first.other_s - figures.other_s,
            first.memory_s - figures.memory_s,
        )
        rows.append([" ".join(map(str, figures.case)), *(f"{seconds:+.1f}" for seconds in parts)])
    header = [f"s saved over {base}, off", "all", "overlap", "preemption", "sharing", "fuller steps", "KV reads"]
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", default=",".join(MIXES))
    parser.add_argument("--kv-mib", default=",".join(map(str, KV_MIB)))
    parser.add_argument("--overlap", default="off,on")
    parser.add_argument("--policies", default=",".join(POLICY_NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="simulations at once (1)")
    parser.add_argument(
        "--details", action="store_true", help="also print where the time of each run goes, and what it saves"
    )
    arguments = parser.parse_args()
    print_header()
    policies = arguments.policies.split(",")
    cases = [
        Case(mix, int(kv_mib), overlap, policy)
        for mix in arguments.mixes.split(",")
        for kv_mib in arguments.kv_mib.split(",")
        for overlap in arguments.overlap.split(",")
        for policy in policies
    ]
    with multiprocessing.Pool(arguments.jobs) as workers:
        found = workers.map(partial(figures_of, seed=arguments.seed), cases, chunksize=1)
    print(summary(found, policies))
    if arguments.details:
        print("\n" + details(found))
        print("\n" + gains(found))


if __name__ == "__main__":
    main()

"""Policies side by side on the native engine: `blendserve run` on whole blended files, the entrants in turn.

An entrant is a policy with operators overlapping or not, as in `blend`, `dfs` or `fcfs/off`. Reports the run (parsing,
planning, running and writing; loading the model apart), prefix sharing against the most possible, scheduling share, and
balance: 1 where every step mixes compute and memory as the whole run does.

    python bench/policies.py --questions PATH/mmlu_questions.jsonl --repeats 2
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import mixes

from blendserve.planner.tree import PrefixTree


@dataclass(frozen=True, slots=True)
class Outcome:
    """One whole run. `sharing` is the share of prompt tokens that needed no computation; `neighbours` the share of the
    machine that other processes took meanwhile. `balance` is that of `RunStats`."""

    entrant: str
    elapsed_s: float
    sharing: float
    scheduling_share: float
    balance: float
    num_preemptions: int
    num_steps: int
    neighbours: float


def main() -> None:
    arguments = _parse()
    common.print_header()
    entrants = arguments.entrants.split(",")
    chosen = [mix.scaled(arguments.scale) for mix in mixes.MIXES if mix.name in arguments.mixes.split(",")]
    for mix in chosen:
        with tempfile.TemporaryDirectory() as directory:
            batch_file = Path(directory) / f"{mix.name}.jsonl"
            lines = mixes.build(mix, arguments.questions)
            mixes.write_batch_file(lines, batch_file)
            most_sharing = _describe(mix, lines)
            outcomes = [
                outcome
                for repeat in range(arguments.repeats)
                for outcome in _round(arguments, entrants, repeat, batch_file)
            ]
        print("\n" + table(entrants, outcomes, most_sharing) + "\n", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="MMLU questions, one JSON object a line")
    parser.add_argument("--entrants", default="fcfs/off,dfs,paper,blend")
    parser.add_argument("--mixes", default=",".join(mix.name for mix in mixes.MIXES))
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the requests, for a quick look")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kv-memory", default="512MiB")
    parser.add_argument("--run-options", default="", help="more options of `blendserve run`, for every entrant")
    return parser.parse_args()


def _describe(mix: mixes.Mix, lines: list[mixes.Line]) -> float:
    """Print what the file holds; returns the largest share of prompt tokens that any order can share."""
    prompts = mixes.encode(lines)
    sharing = PrefixTree.from_prompts(prompts).sharing
    print(f"### {mixes.title(mix, lines, prompts)}, most sharing {sharing:.3f}\n", flush=True)
    return sharing


def _round(arguments: argparse.Namespace, entrants: list[str], repeat: int, batch_file: Path) -> list[Outcome]:
    """Every entrant once; each time another one begins."""
    outcomes = []
    for position in range(len(entrants)):
        entrant = entrants[(position + repeat) % len(entrants)]
        outcomes.append(_run(arguments, entrant, batch_file))
        print(f"{repeat + 1}/{arguments.repeats} {entrant}: {outcomes[-1].elapsed_s:.1f} s", flush=True)
    return outcomes


def _run(arguments: argparse.Namespace, entrant: str, batch_file: Path) -> Outcome:
    policy, _, overlap = entrant.partition("/")
    options = ["--policy", policy, "--overlap", overlap or "on", "--kv-memory", arguments.kv_memory]
    before = common.cpu_use()
    summary = mixes.run_batch_file(batch_file, [*options, *arguments.run_options.split()])
    return outcome_of(entrant, summary, common.cpu_use() - before)


def outcome_of(entrant: str, summary: dict[str, Any], used: common.CpuUse) -> Outcome:
    """The figures of a run from its `--json` summary and what the machine did meanwhile."""
    return Outcome(
        entrant=entrant,
        elapsed_s=summary["makespan_s"] - summary["load_s"],
        sharing=summary["num_cached_tokens"] / summary["num_prompt_tokens"],
        scheduling_share=summary["scheduling_share"],
        balance=summary["balance"],
        num_preemptions=summary["num_preemptions"],
        num_steps=summary["num_steps"],
        neighbours=used.stolen_s / max(used.busy_s + used.stolen_s, 1e-9),
    )


def table(entrants: list[str], outcomes: list[Outcome], most_sharing: float) -> str:
    """A row per entrant; speed-ups are over the first one, repeat by repeat."""
    by_entrant = {entrant: [run for run in outcomes if run.entrant == entrant] for entrant in entrants}
    first = [run.elapsed_s for run in by_entrant[entrants[0]]]
    rows = []
    for entrant, runs in by_entrant.items():
        speedups = [base / run.elapsed_s for base, run in zip(first, runs, strict=True)]
        last = runs[-1]
        rows.append(
            [
                entrant,
                common.summarise([run.elapsed_s for run in runs]).text(1),
                common.summarise(speedups).text(2) + "x",
                f"{last.sharing:.3f}",
                f"{last.sharing / most_sharing:.1%}" if most_sharing else "-",
                f"{last.scheduling_share:.2%}",
                f"{last.balance:.2f}",
                str(last.num_preemptions),
                str(last.num_steps),
                f"{max(run.neighbours for run in runs):.0%}",
            ]
        )
    measured = ["seconds", f"against {entrants[0]}", "sharing", "of the most", "scheduling", "balance"]
    return common.table(["", *measured, "preempted", "steps", "stolen"], rows)


if __name__ == "__main__":
    main()

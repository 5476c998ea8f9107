"""What replicas gain. Simulated: one job on 1 to 64 virtual GPUs, each with its part of one central plan.

    python bench/replicas.py --parts             # only how a plan of 400,000 requests divides
    python bench/replicas.py                     # simulated: two of the paper's blends at a scale of 0.2
    python bench/replicas.py --measure           # measured: native replicas of one thread against one of two

Measured runs are whole commands on one Ray cluster of this machine, in turn; the time is from the first replica being
up, weights not yet read, to the last answer written to the journal.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from paper_run import Cell, make_machine, make_workload

from blendserve.engines.replicas.cluster import open_cluster
from blendserve.planner.partition import Partition, partition
from blendserve.simulator.simulate import plan_workload, simulate
from blendserve.simulator.workloads.knowledge import SAMPLED

BLENDS = {"trace #1": (1.4, 0.35), "trace #4": (0.9, 0.05)}
COUNTS = (1, 2, 4, 8, 16, 32, 64)
VOCAB_SIZE = 49152
EVENNESS = ("load off mean", "density spread", "tokens shared no more")


@dataclass(frozen=True, slots=True)
class Setup:
    """A way to use two cores."""

    name: str
    arguments: tuple[str, ...]


ONE = Setup("1 replica x 1 thread", ("--threads", "1", "--replicas", "1"))
TWO = Setup("2 replicas x 1 thread", ("--threads", "1", "--replicas", "2"))
THREADS = Setup("no Ray, 2 threads", ("--threads", "2"))


def main() -> None:
    arguments = _parse()
    common.print_header()
    if arguments.measure:
        _measure(arguments)
    elif arguments.parts:
        for name, target in BLENDS.items():
            print(f"{name}: density {target[0]}, sharing {target[1]:.0%}, planned\n")
            print(_parts(*target, arguments.replicas) + "\n", flush=True)
    else:
        for name, target in list(BLENDS.items())[: arguments.blends]:
            print(f"{name}: density {target[0]}, sharing {target[1]:.0%} (simulated)\n")
            print(_scaling(*target, arguments.scale, arguments.replicas) + "\n", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--parts", action="store_true", help="divide the plan of 400,000 requests, simulate nothing")
    parser.add_argument("--scale", type=float, default=0.2, help="simulated: 400,000 x SCALE^2 requests (0.2)")
    parser.add_argument("--replicas", type=int, nargs="+", default=COUNTS, metavar="N")
    parser.add_argument("--blends", type=int, default=2, metavar="N", help="simulated: the first N blends (2)")
    parser.add_argument("--repeats", type=int, default=1, help="measured (1)")
    parser.add_argument("--requests", type=int, default=40, help="measured (40)")
    parser.add_argument("--tokens", type=int, default=64, help="measured: of prompts and, on average, answers (64)")
    return parser.parse_args()


def _parts(density: float, sharing: float, counts: list[int]) -> str:
    cell = Cell("replicas", "blend", density, sharing)
    plan = plan_workload(make_workload(cell, 1.0), make_machine(cell, 1.0, "overlapped"), SAMPLED)
    largest = max(float(work.max() / work.sum()) for work in (plan.schedule.compute_s, plan.schedule.memory_s))
    rows = [[str(count), *_evenness(partition(plan, count)), f"{largest * count:.1%}"] for count in counts]
    return common.table(["replicas", *EVENNESS, "largest request, of a mean part"], rows)


def _evenness(parts: Partition) -> list[str]:
    return [f"{parts.imbalance:.2%}", f"{parts.density_spread:.2%}", f"{parts.sharing_lost:.2%}"]


def _scaling(density: float, sharing: float, scale: float, counts: list[int]) -> str:
    cell = Cell("replicas", "blend", density, sharing)
    workload, machine = make_workload(cell, scale), make_machine(cell, scale, "overlapped")
    plan = plan_workload(workload, machine, SAMPLED)
    rows = []
    alone_s: float | None = None
    for count in counts:
        parts = partition(plan, count)
        result = simulate(workload, machine, "blend", num_replicas=count)
        times_s = [replica.time_s for replica in result.replicas]
        alone_s = alone_s or result.time_s * count
        rows.append(
            [
                str(count),
                *_evenness(parts),
                f"{max(times_s) / (sum(times_s) / count) - 1:.1%}",
                f"{alone_s / result.time_s:.2f}x",
                f"{alone_s / result.time_s / count:.3f}",
                f"{result.sharing_kept:.1%}",
            ]
        )
        print(f"{count} replicas: {result.time_s:.1f} s", file=sys.stderr, flush=True)
    header = ["replicas", *EVENNESS, "slowest off mean", "speedup", "efficiency", "sharing kept"]
    return common.table(header, rows)


def _measure(arguments: argparse.Namespace) -> None:
    setups = (ONE, TWO, THREADS)
    times_s: dict[str, list[float]] = {setup.name: [] for setup in setups}
    with tempfile.TemporaryDirectory(prefix="blendserve-") as name, open_cluster(None, 0) as ray:
        source = _write_job(Path(name) / "in.jsonl", arguments.requests, arguments.tokens)
        answers: set[str] = set()
        for repeat in range(arguments.repeats):
            for setup in setups[repeat % 3 :] + setups[: repeat % 3]:
                summary = _run(setup, source, Path(name) / "out.jsonl", ray.get_runtime_context().gcs_address)
                seconds = summary["run_s"] if "--replicas" in setup.arguments else summary["load_s"] + summary["run_s"]
                times_s[setup.name].append(seconds)
                answers.add(_texts(Path(name) / "out.jsonl"))
                print(f"{repeat + 1}/{arguments.repeats} {setup.name}: {seconds:.2f} s", flush=True)
        print(f"\nanswers are {'the same' if len(answers) == 1 else 'NOT the same'} in all runs\n")
    rows = []
    for setup in setups:
        ratios = [theirs / ours for theirs, ours in zip(times_s[ONE.name], times_s[setup.name], strict=True)]
        rows.append([setup.name, common.summarise(times_s[setup.name]).text(2), common.summarise(ratios).text(2) + "x"])
    print(common.table(["", "seconds", f"against {ONE.name}"], rows))


def _write_job(path: Path, num_requests: int, num_tokens: int) -> Path:
    """Prompts of random tokens, answers of half to one and a half times as many."""
    source = random.Random(0)
    lines = []
    for number in range(num_requests):
        body = {
            "model": "m",
            "prompt": [source.randrange(1000, VOCAB_SIZE) for _ in range(num_tokens)],
            "max_tokens": num_tokens // 2 + number * num_tokens // max(1, num_requests - 1),
            "ignore_eos": True,
            "temperature": 0,
        }
        lines.append(json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}))
    path.write_text("\n".join(lines))
    return path


def _run(setup: Setup, source: Path, output: Path, address: str) -> dict[str, Any]:
    where = ("--ray-address", address) if "--replicas" in setup.arguments else ()
    names = ["run", str(source), "-o", str(output), "--model", "SmolLM2-135M-Instruct"]
    command = [sys.executable, "-m", "blendserve", *names]
    limits = ["--kv-memory", "256MiB", "--max-num-seqs", "64", "--max-num-batched-tokens", "512"]
    options = [*limits, *setup.arguments, *where, "--json", "--fresh", "--ordered"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def _texts(output: Path) -> str:
    rows = map(json.loads, output.read_text().splitlines())
    return "\n".join(json.dumps(row["response"]["body"]["choices"]) for row in rows)


if __name__ == "__main__":
    main()

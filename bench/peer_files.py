"""BlendServe beside its peers on whole blended files: the same prompts and output lengths, in turn, in one run.

Ours is `blendserve run` from file to file: parsing, tokenizing, planning, running and writing. The peers are timed from
tokenized prompts to tokens. Loading the model counts for nobody. Set the peers up with scripts/setup-peers.

    python bench/peer_files.py --questions PATH/mmlu_questions.jsonl --peers openvino,llamacpp --scale 0.3
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common
import mixes
from peer_process import PeerError, PeerProcess
from peers import RUN_TIMEOUT_S, start_entrants

from blendserve.host import cache_dir
from blendserve.models.hub import resolve
from blendserve.request import TokenIds


@dataclass(frozen=True, slots=True)
class FileRun:
    """One timed run. `stolen` is the share of the machine's CPU time that its neighbours took."""

    entrant: str
    repeat: int
    elapsed_s: float
    stolen: float


def main() -> None:
    arguments = _parse()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the workers are ended too
    common.print_header()
    chosen = [mix.scaled(arguments.scale) for mix in mixes.MIXES if mix.name in arguments.mixes.split(",")]
    model = resolve(None, cache_dir(), print).path
    names = [name for name in arguments.peers.split(",") if name]
    with contextlib.ExitStack() as stack:
        processes = start_entrants(names, model, arguments.threads, [], arguments.timeout, stack)
        for mix in chosen:
            print(_race(mix, processes, arguments), flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="MMLU questions, one JSON object a line")
    parser.add_argument("--peers", default="openvino,llamacpp,vllm,transformers", help="comma-separated")
    parser.add_argument("--ours", default="bf16", help="dtypes of ours, comma-separated: bf16, int8")
    parser.add_argument("--mixes", default=",".join(mix.name for mix in mixes.MIXES))
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the requests, for a quick look")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=RUN_TIMEOUT_S, help="seconds that one run may take")
    return parser.parse_args()


def _race(mix: mixes.Mix, processes: list[PeerProcess], arguments: argparse.Namespace) -> str:
    """Run one file through everybody `repeats` times; each time another one begins. Returns the table."""
    lines = mixes.build(mix, arguments.questions)
    prompts = mixes.encode(lines)
    print(f"### {mixes.title(mix, lines, prompts)}\n", flush=True)
    ours = [f"ours-{dtype}" for dtype in arguments.ours.split(",")]
    running: list[str | PeerProcess] = [*ours, *processes]
    runs: list[FileRun] = []
    with tempfile.TemporaryDirectory() as directory:
        batch_file = Path(directory) / f"{mix.name}.jsonl"
        mixes.write_batch_file(lines, batch_file)
        for repeat in range(arguments.repeats):
            for position in range(len(running)):
                one = running[(position + repeat) % len(running)]
                name = one if isinstance(one, str) else one.name
                try:
                    runs.append(_timed(one, name, repeat, lines, prompts, batch_file))
                except PeerError as error:
                    print(f"left out: {error}\n")
                    continue
                print(f"{mix.name} {repeat + 1}/{arguments.repeats} {name}: {runs[-1].elapsed_s:.1f} s", flush=True)
    num_tokens = sum(map(len, prompts)) + sum(line.output_tokens for line in lines)
    return "\n" + table(runs, num_tokens) + "\n"


def _timed(
    one: str | PeerProcess,
    name: str,
    repeat: int,
    lines: list[mixes.Line],
    prompts: list[TokenIds],
    batch_file: Path,
) -> FileRun:
    before = common.cpu_use()
    if isinstance(one, str):
        summary = mixes.run_batch_file(batch_file, ["--dtype", one.removeprefix("ours-")])
        elapsed_s = summary["makespan_s"] - summary["load_s"]
    else:
        counts = [line.output_tokens for line in lines]
        elapsed_s = one.run([prompt.tolist() for prompt in prompts], counts).elapsed_s
    used = common.cpu_use() - before
    return FileRun(name, repeat, elapsed_s, used.stolen_s / max(used.busy_s + used.stolen_s, 1e-9))


def table(runs: list[FileRun], num_tokens: int) -> str:
    """A row per entrant; the ratios are of times within a repeat, against each of ours."""
    names = list(dict.fromkeys(run.entrant for run in runs))
    ours = [name for name in names if name.startswith("ours-")]
    rows = []
    for name in names:
        own = [run for run in runs if run.entrant == name]
        ratios = []
        for base in ours:
            base_s = {run.repeat: run.elapsed_s for run in runs if run.entrant == base}
            paired = [run.elapsed_s / base_s[run.repeat] for run in own if run.repeat in base_s]
            ratios.append("" if name == base or not paired else common.summarise(paired).text(2) + "x")
        seconds = common.summarise([run.elapsed_s for run in own])
        rows.append(
            [name, seconds.text(1), f"{num_tokens / seconds.median:.0f}", *ratios, f"{max(r.stolen for r in own):.0%}"]
        )
    return common.table(["", "seconds", "in+out tok/s", *(f"{name} is" for name in ours), "stolen"], rows)


if __name__ == "__main__":
    main()

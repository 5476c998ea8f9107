"""BlendServe beside its peers on whole blended files: the same prompts and output lengths, in turn, in one run.

Ours is `blendserve run` from file to file: parsing, tokenizing, planning, running and writing. The peers are timed from
tokenized prompts to tokens. Loading the model counts for nobody. Set the peers up with scripts/setup-peers. Every run
is stored when it ends: a race that was stopped goes on where it was when it is started again; after a change of our
engine it begins anew. Mixes are those of `token_mixes.py`, and those of `mixes.py` (`text-exam`, ...) where
`--questions` is given.

    python bench/peer_files.py --peers openvino,llamacpp --mixes all --scale 0.3
    python bench/peer_files.py ... --show                               the tables of what is done
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import common
import mixes
import policies
from peaks import Peak, peak_of
from peer_process import PeerError, PeerProcess
from peers import RUN_TIMEOUT_S, Workload, start_entrants
from run_store import RESULTS, Progress, RunStore

from blendserve.host import cache_dir
from blendserve.models.gguf_file import GgufFile
from blendserve.models.gguf_spec import spec_from_gguf
from blendserve.models.hub import resolve
from blendserve.models.spec import ModelSpec
from blendserve.planner.tree import PrefixTree
from blendserve.request import TokenIds

OURS = "ours-"


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
    store = RunStore(arguments.store)
    model = resolve(arguments.model, cache_dir(), print).path
    mixes_asked = arguments.mixes.split(",")
    cells = cells_of(mixes_asked, model.name, arguments)
    if arguments.scale != 1.0:
        print(f"SMALL RUN: {arguments.scale:g} of the requests.\n")
    if not arguments.show:
        todo = [cell for cell in cells if not store.runs(cell.key)]
        peers = dict.fromkeys(cell.entrant for cell in todo if not cell.entrant.startswith(OURS))
        with contextlib.ExitStack() as stack:
            processes = start_entrants(list(peers), model, arguments.threads, [], arguments.timeout, stack)
            _race(todo, processes, model, store, arguments.questions)
    peak, spec = peak_of(), spec_from_gguf(model.name, GgufFile(model))
    print(f"peak: {peak.bf16 / 1e9:.0f} GFLOP/s in bf16, {peak.int8 / 1e9:.0f} GOPS in int8 ({peak.source})\n")
    for mix in mixes_asked:
        lines = lines_of(mix, arguments.scale, arguments.questions)
        prompts = mixes.encode(lines)
        runs = [FileRun(**run) for cell in cells if cell.mix == mix for run in store.runs(cell.key)[:1]]
        print(f"### {mix}: {len(lines)} requests\n\n{table(runs, work_of(lines, prompts, spec), peak)}\n", flush=True)
    print(f"measured at {', '.join(sorted(store.commits)) or 'no commit'}; kept in {arguments.store}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, help="MMLU questions, one JSON object a line, for text mixes")
    parser.add_argument(
        "--peers", default="openvino,llamacpp,vllm", help="comma-separated; also vllm-int8, transformers"
    )
    parser.add_argument("--model", help="GGUF file; the default model if absent")
    parser.add_argument("--ours", default="bf16", help="dtypes of ours, comma-separated: bf16, int8")
    parser.add_argument("--mixes", default="exam,digest,all", help="comma-separated")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the requests, for a quick look")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--show", action="store_true", help="run nothing, print the tables of what is done")
    parser.add_argument("--store", type=Path, default=RESULTS / "peer-files.jsonl")
    parser.add_argument("--timeout", type=float, default=RUN_TIMEOUT_S, help="seconds that one run may take")
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of an entrant; `key` names it in the store."""

    mix: str
    scale: float
    entrant: str
    repeat: int
    key: dict[str, Any]


def cells_of(chosen: Sequence[str], model: str, arguments: argparse.Namespace) -> list[Cell]:
    """Every file `repeats` times through everybody; each time another one begins."""
    names = [f"{OURS}{dtype}" for dtype in arguments.ours.split(",")] + [n for n in arguments.peers.split(",") if n]
    common_key = {"bench": "peer_files", "scale": arguments.scale, "model": model, "threads": arguments.threads}
    return [
        Cell(mix, arguments.scale, name, repeat, {**common_key, "mix": mix, "entrant": name, "repeat": repeat})
        for mix in chosen
        for repeat in range(arguments.repeats)
        for name in (names[(position + repeat) % len(names)] for position in range(len(names)))
    ]


def lines_of(mix: str, scale: float, questions: Path | None) -> list[mixes.Line]:
    return policies.lines_of(policies.Setting(mix, "bf16", "", scale), questions)


def _race(
    todo: Sequence[Cell], processes: Sequence[PeerProcess], model: Path, store: RunStore, questions: Path | None
) -> None:
    """Run and store the cells of ours, and of the peers that started."""
    running = {process.name: process for process in processes}
    todo = [cell for cell in todo if cell.entrant.startswith(OURS) or cell.entrant in running]
    progress = Progress([], len(todo))
    with tempfile.TemporaryDirectory() as directory:
        for cell in todo:
            lines = lines_of(cell.mix, cell.scale, questions)
            batch_file = Path(directory) / f"{cell.mix}.jsonl"
            if not batch_file.exists():
                mixes.write_batch_file(lines, batch_file)
            try:
                run = _timed(cell, running.get(cell.entrant), lines, batch_file, model)
            except PeerError as error:
                print(f"left out: {error}\n")
                continue
            store.add(cell.key, asdict(run))
            progress.done(run.elapsed_s)
            print(f"{cell.mix} {cell.repeat + 1} {cell.entrant}: {run.elapsed_s:.1f} s; {progress}", flush=True)
    print()


def _timed(
    cell: Cell, process: PeerProcess | None, lines: Sequence[mixes.Line], batch_file: Path, model: Path
) -> FileRun:
    before = common.cpu_use()
    if process is None:
        dtype = cell.entrant.removeprefix(OURS)
        summary = mixes.run_batch_file(batch_file, ["--dtype", dtype, "--model", str(model)])
        elapsed_s = summary["makespan_s"] - summary["load_s"]
    else:
        prompts = [prompt.tolist() for prompt in mixes.encode(lines)]
        elapsed_s = process.run(prompts, [line.output_tokens for line in lines]).elapsed_s
    used = common.cpu_use() - before
    return FileRun(cell.entrant, cell.repeat, elapsed_s, used.stolen_s / max(used.busy_s + used.stolen_s, 1e-9))


class FileWork(NamedTuple):
    """What a file asks for: tokens in and out, and operations where every shared prefix is computed once."""

    num_tokens: int
    flop: float


def work_of(lines: Sequence[mixes.Line], prompts: Sequence[TokenIds], spec: ModelSpec) -> FileWork:
    """Attention of a shared prefix is counted for every request that reads it, its matrices once."""
    jobs = [Workload("", 1, len(prompt), line.output_tokens) for line, prompt in zip(lines, prompts, strict=True)]
    num_prompt_tokens = sum(map(len, prompts))
    num_shared = PrefixTree.from_prompts(list(prompts)).sharing * num_prompt_tokens
    flop = sum(job.flop(spec) for job in jobs) - 2.0 * num_shared * spec.num_layers * spec.num_layer_parameters
    return FileWork(sum(job.num_tokens for job in jobs), flop)


def table(runs: list[FileRun], work: FileWork, peak: Peak) -> str:
    """A row per entrant; the ratios are of times within a repeat, against each of ours."""
    names = list(dict.fromkeys(run.entrant for run in runs))
    ours = [name for name in names if name.startswith(OURS)]
    rows = []
    for name in names:
        own = [run for run in runs if run.entrant == name]
        ratios = []
        for base in ours:
            base_s = {run.repeat: run.elapsed_s for run in runs if run.entrant == base}
            paired = [run.elapsed_s / base_s[run.repeat] for run in own if run.repeat in base_s]
            ratios.append("" if name == base or not paired else common.summarise(paired).text(2) + "x")
        seconds = common.summarise([run.elapsed_s for run in own])
        share = peak.share(work.flop / seconds.median, name.partition("-")[2])
        tokens_per_s = f"{work.num_tokens / seconds.median:.0f}"
        rows.append([name, seconds.text(1), tokens_per_s, share, *ratios, f"{max(r.stolen for r in own):.0%}"])
    header = ["", "seconds", "in+out tok/s", "of peak", *(f"{name} is" for name in ours), "stolen"]
    return common.table(header, rows) if rows else "nothing is done yet"


if __name__ == "__main__":
    main()

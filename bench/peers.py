"""BlendServe beside its peers on this machine: the same prompts and output lengths, in turn, in one run.

Prompts are random token ids (no text, no prefix in common), end of sequence is ignored, sampling is greedy. Timed from
token ids to token ids with the model loaded; every run uses new prompts, so that no engine's prefix cache helps.
Set the peers up with scripts/setup-peers. Every run is stored when it ends: a race that was stopped goes on where it
was when it is started again; after a change of our engine it begins anew.

    python bench/peers.py --peers openvino,llamacpp --repeats 3
    python bench/peers.py --peers ours-int8,openvino,openvino-q8_0,llamacpp,vllm,vllm-int8
    python bench/peers.py ... --show                                    the tables of what is done
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
from peaks import Peak, peak_of
from peer_lineup import entrant, parse_override
from peer_process import PeerError, PeerProcess, Run
from run_store import RESULTS, Progress, RunStore

from blendserve.host import cache_dir
from blendserve.models.gguf_file import GgufFile
from blendserve.models.gguf_spec import spec_from_gguf
from blendserve.models.hub import resolve
from blendserve.models.spec import ModelSpec

# "What is the capital of France?" in the default model's chat template.
QUESTION = (1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198)
MAX_ANSWER_TOKENS = 24
RUN_TIMEOUT_S = 1800.0
FIRST_ORDINARY_TOKEN = 64  # below lie control tokens, which some engines treat apart


@dataclass(frozen=True, slots=True)
class Workload:
    """Equal requests: `num_requests` prompts of `prompt_tokens`, each answered by exactly `output_tokens`."""

    name: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int

    def scaled(self, scale: float) -> Workload:
        return Workload(self.name, max(2, round(self.num_requests * scale)), self.prompt_tokens, self.output_tokens)

    def prompts(self, vocab_size: int, seed: str) -> list[list[int]]:
        source = random.Random(seed)
        return [
            [source.randrange(FIRST_ORDINARY_TOKEN, vocab_size) for _ in range(self.prompt_tokens)]
            for _ in range(self.num_requests)
        ]

    @property
    def num_tokens(self) -> int:
        return self.num_requests * (self.prompt_tokens + self.output_tokens)

    def flop(self, spec: ModelSpec) -> float:
        """Multiply-adds count two. The last token made is not fed back; logits are made for sampled positions only."""
        fed = self.prompt_tokens + self.output_tokens - 1
        matrices = 2.0 * fed * spec.num_layers * spec.num_layer_parameters
        logits = 2.0 * self.output_tokens * spec.vocab_size * spec.hidden_size
        attention = 4.0 * spec.num_layers * spec.num_heads * spec.head_dim * fed * (fed + 1) / 2
        return self.num_requests * (matrices + logits + attention)

    def decode_bytes(self, spec: ModelSpec) -> float:
        """Bytes that decoding reads in bf16 with all requests in one batch: their KV, and the weights once per step."""
        contexts = sum(self.prompt_tokens + made for made in range(1, self.output_tokens))
        weights = 2.0 * (spec.num_layers * spec.num_layer_parameters + spec.vocab_size * spec.hidden_size)
        return self.num_requests * contexts * spec.kv_bytes_per_token() + self.output_tokens * weights


WORKLOADS = (Workload("prefill", 32, 1000, 2), Workload("decode", 64, 16, 256), Workload("mixed", 64, 1000, 256))


@dataclass(frozen=True, slots=True)
class Result:
    """One timed run. `neighbours` is the share of the machine's CPU time that other processes took meanwhile."""

    peer: str
    workload: str
    repeat: int
    elapsed_s: float
    cpu_s: float
    num_tokens: int
    num_output_tokens: int
    neighbours: float


def main() -> None:
    arguments = _parse()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the workers are ended too
    common.print_header()
    model = resolve(arguments.model, cache_dir(), print)
    spec = spec_from_gguf(model.name, GgufFile(model.path))
    workloads = [w.scaled(arguments.scale) for w in WORKLOADS if w.name in arguments.workloads.split(",")]
    names = [*(() if arguments.without_ours else ("ours",)), *filter(None, arguments.peers.split(","))]
    store = RunStore(arguments.store)
    cells = cells_of(workloads, names, model.name, arguments)
    if arguments.scale != 1.0:
        print(f"SMALL RUN: {arguments.scale:g} of the requests.\n")
    if not arguments.show:
        todo = [cell for cell in cells if not store.runs(cell.key)]
        waiting = [name for name in names if any(cell.peer == name for cell in todo)]
        with contextlib.ExitStack() as stack:
            processes = start_entrants(waiting, model.path, arguments.threads, arguments.set, arguments.timeout, stack)
            _race(processes, todo, spec, store)
    results = [Result(**run) for cell in cells for run in store.runs(cell.key)[:1]]
    peak = peak_of()
    print(f"peak: {peak.bf16 / 1e9:.0f} GFLOP/s in bf16, {peak.int8 / 1e9:.0f} GOPS in int8 ({peak.source})\n")
    for workload in workloads:
        print(_table(workload, [r for r in results if r.workload == workload.name], spec, peak), flush=True)
    print(f"measured at {', '.join(sorted(store.commits)) or 'no commit'}; kept in {arguments.store}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", default="openvino,llamacpp", help="comma-separated; also vllm, vllm-int8, ours-int8, openvino-q8_0"
    )
    parser.add_argument("--without-ours", action="store_true", help="race the peers alone")
    parser.add_argument("--workloads", default=",".join(w.name for w in WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the requests, for a quick look")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", help="GGUF file; the default model if absent")
    parser.add_argument("--set", action="append", default=[], metavar="PEER.SETTING=VALUE", help="change a setting")
    parser.add_argument("--timeout", type=float, default=RUN_TIMEOUT_S, help="seconds that one run may take")
    parser.add_argument("--show", action="store_true", help="run nothing, print the tables of what is done")
    parser.add_argument("--store", type=Path, default=RESULTS / "peers.jsonl")
    parser.add_argument("--json", type=Path, help="write every run to this file")
    return parser.parse_args()


def start_entrants(
    names: Sequence[str],
    model: Path,
    threads: int,
    settings: Sequence[str],
    timeout_s: float,
    stack: contextlib.ExitStack,
) -> list[PeerProcess]:
    """Start every entrant and show what it is and whether it read the weights; those that fail are left out, aloud."""
    overrides = [parse_override(text) for text in settings]
    processes, rows = [], []
    for name in names:
        own = {path: value for owner, path, value in overrides if owner == name}
        try:
            chosen = entrant(name, model, threads, own)
            process = stack.enter_context(PeerProcess(chosen, QUESTION, MAX_ANSWER_TOKENS, timeout_s))
        except PeerError as error:
            print(f"left out: {error}\n")
            continue
        told = process.description
        processes.append(process)
        rows.append(
            [
                name,
                told["version"],
                told["precision"],
                f"{told['load_s']:.1f}",
                told["settings"],
                told["answer"].strip(),
            ]
        )
    print(
        common.table(["", "version", "precision", "load s", "settings", "the capital of France?"], rows) + "\n",
        flush=True,
    )
    return processes


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a peer; `key` names it in the store."""

    workload: Workload
    peer: str
    repeat: int
    key: dict[str, Any]


def cells_of(
    workloads: Sequence[Workload], names: Sequence[str], model: str, arguments: argparse.Namespace
) -> list[Cell]:
    """Every workload `repeats` times, the entrants in turn; each time another one begins."""
    given = {name: [text for text in arguments.set if text.startswith(f"{name}.")] for name in names}
    return [
        Cell(
            workload,
            name,
            repeat,
            {
                "bench": "peers",
                **asdict(workload),
                "peer": name,
                "repeat": repeat,
                "model": model,
                "threads": arguments.threads,
                "settings": given[name],
            },
        )
        for workload in workloads
        for repeat in range(arguments.repeats)
        for name in (names[(position + repeat) % len(names)] for position in range(len(names)))
    ]


def _race(processes: list[PeerProcess], todo: Sequence[Cell], spec: ModelSpec, store: RunStore) -> None:
    """Run and store the cells of those that started, each after a small warm-up of its workload."""
    running = {process.name: process for process in processes}
    todo = [cell for cell in todo if cell.peer in running]
    progress, warm = Progress([], len(todo)), set()
    for cell in todo:
        if cell.peer not in running:
            continue
        process, workload = running[cell.peer], cell.workload
        try:
            if (cell.peer, workload.name) not in warm:
                warm.add((cell.peer, workload.name))
                small = Workload(workload.name, 4, workload.prompt_tokens, min(workload.output_tokens, 8))
                _timed(process, small, small.prompts(spec.vocab_size, f"{workload.name} -1"), -1)
            prompts = workload.prompts(spec.vocab_size, f"{workload.name} {cell.repeat}")
            result = _timed(process, workload, prompts, cell.repeat)
        except PeerError as error:
            print(f"drops out of the race: {error}\n")
            del running[cell.peer]
            continue
        store.add(cell.key, asdict(result))
        progress.done(result.elapsed_s)
        print(f"{workload.name} {cell.repeat + 1} {cell.peer}: {result.elapsed_s:.1f} s; {progress}", flush=True)
    print()


def _timed(process: PeerProcess, job: Workload, prompts: list[list[int]], repeat: int) -> Result:
    before = common.cpu_use()
    run: Run = process.run(prompts, [job.output_tokens] * job.num_requests)
    used = common.cpu_use() - before
    others = max(0.0, used.busy_s - run.cpu_s + used.stolen_s) / (run.elapsed_s * os.cpu_count())  # type: ignore[operator]
    return Result(
        process.name, job.name, repeat, run.elapsed_s, run.cpu_s, job.num_tokens, run.num_output_tokens, others
    )


def _table(workload: Workload, results: list[Result], spec: ModelSpec, peak: Peak) -> str:
    title = (
        f"### {workload.name}: {workload.num_requests} requests, {workload.prompt_tokens} tokens in, "
        f"{workload.output_tokens} out; "
        f"{workload.flop(spec) / 1e9:.0f} GFLOP, decode reads {workload.decode_bytes(spec) / 1e9:.1f} GB\n"
    )
    by_peer: dict[str, list[Result]] = {}
    for result in results:
        by_peer.setdefault(result.peer, []).append(result)
    rows = [_row(name, runs, by_peer.get("ours"), workload, spec, peak) for name, runs in by_peer.items()]
    header = [
        "",
        "seconds",
        "in+out tok/s",
        "out tok/s",
        "GFLOP/s",
        "of peak",
        "GB/s",
        "ours is",
        "cpu s",
        "neighbours",
    ]
    return title + "\n" + common.table(header, rows) + "\n"


def _row(
    name: str, runs: list[Result], ours: list[Result] | None, workload: Workload, spec: ModelSpec, peak: Peak
) -> list[str]:
    seconds = common.summarise([run.elapsed_s for run in runs])
    return [
        name,
        seconds.text(1),
        common.summarise([run.num_tokens / run.elapsed_s for run in runs]).text(),
        common.summarise([run.num_output_tokens / run.elapsed_s for run in runs]).text(),
        f"{workload.flop(spec) / seconds.median / 1e9:.0f}",
        peak.share(workload.flop(spec) / seconds.median, name.partition("-")[2]),
        f"{workload.decode_bytes(spec) / seconds.median / 1e9:.1f}"
        if name == "ours"
        else "",  # others store KV otherwise
        "" if ours is None or name == "ours" else _speedup(runs, ours),
        f"{statistics.median(run.cpu_s for run in runs):.1f}",
        f"{statistics.median(run.neighbours for run in runs):.0%}",
    ]


def _speedup(runs: list[Result], ours: list[Result]) -> str:
    """Ratio of times within each repeat, then the median: slow minutes of the machine cancel."""
    own = {run.repeat: run.elapsed_s for run in ours}
    ratios = [run.elapsed_s / own[run.repeat] for run in runs if run.repeat in own]
    return common.summarise(ratios).text(2) + "x" if ratios else ""


if __name__ == "__main__":
    main()

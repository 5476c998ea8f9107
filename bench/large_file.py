"""Memory of a very large batch file: `python bench/large_file.py`, 1,000,000 lines by default.

Tiny requests, so that what is kept per line shows. `check` validates and tokenizes every line; `run` is a whole job
(reading, planning, admission, journal, both files) whose executor makes zeros in no time. Each is a process of its own,
whose peak of resident memory counts; mapped files are part of it while their pages are in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from common import print_header
from scheduler import TokenSimulator

from blendserve.config import BLOCK_SIZE, EngineConfig
from blendserve.costs.model_cost import CostModel
from blendserve.dialect.codec import ModelCodec
from blendserve.dialect.schema import ServedModel
from blendserve.engine.loop import EngineLoop
from blendserve.engine.planned import plan_requests, run_planned, run_windowed
from blendserve.engines.native.engine import windows_of
from blendserve.host import cache_dir
from blendserve.job.check import check_file
from blendserve.job.job import BatchJob, run_job
from blendserve.job.pending import PendingRequests
from blendserve.models.hub import resolve
from blendserve.models.load import load_model
from blendserve.request import SequenceOutput

MAX_TOKENS = 4
NUM_SEQS = 4096
COST = CostModel(token_s=1e-3, kv_token_s=1e-6)


def write_input(path: Path, num_lines: int) -> None:
    """Lines that differ in a number."""
    numbers = iter(range(num_lines))
    with path.open("w") as file:
        while chunk := list(islice(numbers, 10_000)):
            file.writelines(_line(number) for number in chunk)


def _line(number: int) -> str:
    body = {"model": "m", "prompt": f"Write the number {number} in words.", "max_tokens": MAX_TOKENS}
    fields = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(fields) + "\n"


def check(path: Path, codec: ModelCodec, served: ServedModel) -> int:
    return check_file(path, served, codec).num_valid


def run(path: Path, codec: ModelCodec, served: ServedModel, window: int) -> int:
    def generate(pending: PendingRequests) -> Iterator[SequenceOutput]:
        config = EngineConfig(max_num_seqs=NUM_SEQS, max_num_batched_tokens=4 * NUM_SEQS, max_model_len=2048)
        engine = EngineLoop(TokenSimulator(4 * NUM_SEQS, BLOCK_SIZE), config)
        if window:
            yield from run_windowed(engine, pending, windows_of(pending, window), COST, "blend")
        else:
            plan = plan_requests(pending.flat_prompts(), pending.table(), COST)
            yield from run_planned(engine, pending, plan, "blend")

    job = BatchJob(path, path.with_name("out.jsonl"), served, "zeros", is_fresh=True)
    return run_job(job, codec, generate).num_succeeded


def measure(command: str, path: Path, window: int) -> None:
    """The child: does the work and prints its figures as one JSON object."""
    model = load_model(resolve(None, cache_dir()))
    codec = ModelCodec(model.tokenizer)
    served = ServedModel((model.spec.name,), True, model.spec.vocab_size, 2048)
    idle_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    num_lines = check(path, codec, served) if command == "check" else run(path, codec, served, window)
    usage = {
        "num_lines": num_lines,
        "cpu_s": time.process_time() - began,
        "idle_mib": idle_kib / 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(usage))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--commands", nargs="+", default=["check", "run"], choices=["check", "run"])
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where the files go; default: the system's temporary directory")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.child[0], Path(arguments.child[1]), arguments.window)
        return
    print_header()
    print("    lines  command  file MB  CPU s  peak MiB  before MiB  bytes per line")
    for num_lines in arguments.lines:
        for command in arguments.commands:
            with TemporaryDirectory(dir=arguments.directory) as directory:
                path = Path(directory) / "in.jsonl"
                write_input(path, num_lines)
                child = [sys.executable, __file__, "--child", command, str(path), "--window", str(arguments.window)]
                found = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)
                assert found["num_lines"] == num_lines
                per_line = (found["peak_mib"] - found["idle_mib"]) * 1024**2 / num_lines
                print(
                    f"{num_lines:9d}  {command:>7}  {path.stat().st_size / 1e6:7.0f}  {found['cpu_s']:5.0f}"
                    f"  {found['peak_mib']:8.0f}  {found['idle_mib']:10.0f}  {per_line:14.0f}"
                )


if __name__ == "__main__":
    main()

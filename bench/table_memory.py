"""Memory and time of a job on a very large table: `python bench/table_memory.py`, 1,000,000 rows by default.

Rows are short, so that what is kept per row shows. The engine answers in no time, so that all that is left is ours:
reading parquet, rendering, tokenizing, the store, the plans of all parts, the journal, and writing parquet. Each size
is a process of its own, whose peak of resident memory counts; mapped files are part of it while their pages are in
memory.
`--without-plan` leaves the plan out, which is the same for tables and for batch files.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import print_header

from blendserve import map_file
from blendserve.costs.model_cost import CostModel
from blendserve.dialect.codec import ModelCodec
from blendserve.dialect.schema import ServedModel
from blendserve.engines.base import EngineStatus, EngineTimes
from blendserve.host import cache_dir
from blendserve.job.pending import PendingRequests, plan_pending
from blendserve.models.hub import resolve
from blendserve.models.load import load_model
from blendserve.planner.plan import Plan
from blendserve.request import SequenceOutput

GROUP_ROWS = 100_000
NUM_TOKENS = 4
COST = CostModel(token_s=1e-3, kv_token_s=1e-6)


class NothingEngine:
    """An `Engine` that computes nothing: every answer is the same four tokens."""

    identity = "nothing"
    capacity_bytes = 0
    notes: tuple[str, ...] = ()
    times = EngineTimes()
    stats = None

    def __init__(self, *, plans: bool) -> None:
        model = load_model(resolve(None, cache_dir()))
        self.codec = ModelCodec(model.tokenizer)
        self.served = ServedModel((model.spec.name,), True, model.spec.vocab_size, 2048)
        self.settings: dict[str, Any] = {}
        self._plans = plans
        self._tokens = np.full(NUM_TOKENS, 100, np.int32)

    def status(self) -> EngineStatus | None:
        return None

    def plan(self, pending: PendingRequests) -> Plan:
        return plan_pending(pending, pending.table(), COST)

    def generate(self, pending: PendingRequests, policy: str) -> Iterator[SequenceOutput]:  # noqa: ARG002  # one order
        order = np.asarray(self.plan(pending).schedule.order) if self._plans else np.arange(len(pending))
        lengths = pending.table().num_prompt_tokens
        for row in order:
            yield SequenceOutput(int(row), self._tokens, "length", int(lengths[row]), 0)

    def close(self) -> None: ...


def write_input(path: Path, num_rows: int) -> None:
    """Short texts that differ in a number."""
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for begin in range(0, num_rows, GROUP_ROWS):
            numbers = range(begin, min(begin + GROUP_ROWS, num_rows))
            writer.write_table(pa.table({"id": list(numbers), "text": [f"number {one}" for one in numbers]}, schema))


def run_child(path: Path, *, plans: bool) -> None:
    """Do the work, and print its figures as one JSON object."""
    engine = NothingEngine(plans=plans)
    idle_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began_s = time.perf_counter()
    report = map_file(path, path.with_name("out.parquet"), prompt="Write {{ text }} in words.", engine=engine)
    usage = {
        "num_rows": report.num_succeeded,
        "s": time.perf_counter() - began_s,
        "idle_mib": idle_kib / 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(usage))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--without-plan", action="store_true")
    parser.add_argument("--directory", type=Path, help="where files go; default: the system's temporary directory")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child, plans=not arguments.without_plan)
        return
    print_header()
    print("     rows  input MB  output MB  journal MB       s  peak MiB  before MiB  bytes per row")
    for num_rows in arguments.rows:
        with TemporaryDirectory(dir=arguments.directory) as directory:
            path = Path(directory) / "in.parquet"
            write_input(path, num_rows)
            child = [sys.executable, __file__, "--child", str(path)]
            child += ["--without-plan"] if arguments.without_plan else []
            found = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)
            assert found["num_rows"] == num_rows
            journal = sum(file.stat().st_size for file in Path(directory, "out.parquet.journal").rglob("*"))
            per_row = (found["peak_mib"] - found["idle_mib"]) * 1024**2 / num_rows
            print(
                f"{num_rows:9d}  {path.stat().st_size / 1e6:8.0f}  "
                f"{path.with_name('out.parquet').stat().st_size / 1e6:9.0f}  {journal / 1e6:10.0f}  {found['s']:6.0f}  "
                f"{found['peak_mib']:8.0f}  {found['idle_mib']:10.0f}  {per_row:13.0f}"
            )


if __name__ == "__main__":
    main()

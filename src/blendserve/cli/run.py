"""`blendserve run`: answer every line of a batch file."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from blendserve.batchfile.codec import ModelCodec
from blendserve.batchfile.store import PendingRequests
from blendserve.cli.options import add_engine, add_model, engine_config, find_model, served_model, tell
from blendserve.config import EngineConfig
from blendserve.engine.loop import EngineLoop
from blendserve.engine.stats import RunStats
from blendserve.job import BatchJob, JobInterrupted, JobProgress, run_job
from blendserve.models.fingerprint import fingerprint
from blendserve.models.load import LoadedModel, load_model
from blendserve.planner.plan import Plan
from blendserve.planner.policies import POLICY_NAMES
from blendserve.report.progress import Progress, Snapshot
from blendserve.report.summary import RunSummary
from blendserve.request import SequenceOutput
from blendserve.session import cost_of, open_engine, plan_requests, resolve_limits, run_planned

DEFAULT_POLICY = "dfs"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help="answer every line of a batch file",
        description="Answer every line of an OpenAI Batch file. Killed at any moment, the same command goes on where "
        "it stopped; lines that cannot be answered become rows of the error file.",
    )
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="the batch file; may be gzip (.jsonl.gz)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.jsonl", help="where answers go")
    parser.add_argument("--errors", type=Path, metavar="ERR.jsonl", help="where errors go; default: beside the output")
    add_model(parser)
    parser.add_argument(
        "--policy", choices=POLICY_NAMES, default=DEFAULT_POLICY, help=f"order of requests (default: {DEFAULT_POLICY})"
    )
    parser.add_argument("--ordered", action="store_true", help="write answers in input order; default: as they finish")
    parser.add_argument("--fresh", action="store_true", help="discard what an earlier run of this job has finished")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    add_engine(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Run the job. Returns 0 when every line has its row, answered or not; 130 or 143 when interrupted."""
    started_s = time.perf_counter()
    config = engine_config(args)
    files = find_model(args)
    model = load_model(files)
    if args.max_model_len > model.spec.max_position:
        resolve_limits(config, model.spec)
    served = served_model(args, model, args.max_model_len or model.spec.max_position)
    job = BatchJob(
        input_path=args.input,
        output_path=args.output,
        served=served,
        model_identity=f"{model.spec.name} {fingerprint(files)}",
        settings={"isa": args.isa},
        errors_path=args.errors,
        is_ordered=args.ordered,
        is_fresh=args.fresh,
    )
    served_run = _ServedRun(model, config, args.policy, args.isa, is_quiet=args.quiet or args.json)
    try:
        report = run_job(job, ModelCodec(model.tokenizer), served_run.generate, on_progress=served_run.note)
    except JobInterrupted as interrupt:
        tell(f"\nblendserve: {interrupt}")
        return interrupt.exit_code
    summary = RunSummary(
        report=report,
        policy=args.policy,
        makespan_s=time.perf_counter() - started_s,
        load_s=served_run.load_s,
        plan_s=served_run.plan_s,
        run_s=served_run.run_s,
        stats=served_run.stats,
    )
    print(json.dumps(summary.to_json()) if args.json else summary.to_text())
    return 0


class _ServedRun:
    """The engine's part of a job: opened only when requests are left to run, timed, and watched."""

    def __init__(self, model: LoadedModel, config: EngineConfig, policy: str, isa: str, *, is_quiet: bool) -> None:
        self._model = model
        self._config = config
        self._policy = policy
        self._isa = isa
        self._is_quiet = is_quiet
        self._progress = JobProgress(0, 0)
        self.load_s = self.plan_s = self.run_s = 0.0
        self.stats: RunStats | None = None

    def note(self, progress: JobProgress) -> None:
        """Take the job's count of what is done."""
        self._progress = progress

    def generate(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        """Yield the outputs of `pending` as they finish."""
        started_s = time.perf_counter()
        config = resolve_limits(self._config, self._model.spec)
        cost = cost_of(self._model.spec, config.num_threads)
        with closing(open_engine(self._model, config, isa=self._isa)) as engine:
            loaded_s = time.perf_counter()
            plan = plan_requests(pending.flat_prompts(), pending.table(), cost)
            planned_s = time.perf_counter()
            self.load_s, self.plan_s = loaded_s - started_s, planned_s - loaded_s
            try:
                with Progress(lambda: self._snapshot(engine, plan), is_quiet=self._is_quiet):
                    yield from run_planned(engine, pending, plan, self._policy)
            finally:
                self.run_s = time.perf_counter() - planned_s
                self.stats = engine.stats

    def _snapshot(self, engine: EngineLoop, plan: Plan) -> Snapshot:
        stats, progress = engine.stats, self._progress
        expected = float(plan.expected_output_tokens.sum()) + plan.tree.num_unique_tokens
        num_tokens = stats.num_prefill_tokens + stats.num_decode_tokens
        return Snapshot(
            num_done=progress.num_done,
            num_requests=progress.num_requests,
            num_tokens=num_tokens,
            num_expected_tokens=max(0.0, expected - num_tokens),
            num_running=engine.batcher.table.num_running,
            kv_use=1 - engine.batcher.free_tokens / engine.batcher.capacity_tokens,
            prefix_hit_rate=stats.prefix_hit_rate,
        )

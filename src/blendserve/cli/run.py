"""`blendserve run`: answer every line of a batch file."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from blendserve.cli.engines import add_engine_choice, open_run
from blendserve.cli.options import (
    add_engine,
    add_model,
    add_reading,
    add_replicas,
    add_watching,
    read_limits,
    say,
    tell,
)
from blendserve.job.job import BatchJob, JobInterrupted, run_job
from blendserve.job.writer import check_apart, resolve_paths
from blendserve.planner.policies import POLICY_NAMES
from blendserve.report.summary import RunSummary

DEFAULT_POLICY = "blend"


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
    add_reading(parser)
    add_watching(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    add_engine_choice(parser)
    add_engine(parser)
    add_replicas(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Run the job. Returns 0 when every line has its row, answered or not; 130 or 143 when interrupted."""
    started_s = time.perf_counter()
    _check_apart(args)
    engine = open_run(args)
    job = BatchJob(
        input_path=args.input,
        output_path=args.output,
        served=engine.served,
        model_identity=engine.identity,
        settings=engine.settings,
        errors_path=args.errors,
        is_ordered=args.ordered,
        is_fresh=args.fresh,
        limits=read_limits(args),
        capacity=args.kv_memory,
    )
    try:
        with closing(engine):
            report = run_job(job, engine.codec, engine.generate, on_progress=engine.note)
    except JobInterrupted as interrupt:
        tell("")
        tell(f"blendserve: {interrupt}")
        return interrupt.exit_code
    summary = RunSummary(
        report=replace(report, notes=(*report.notes, *engine.notes)),
        policy=args.policy,
        makespan_s=time.perf_counter() - started_s,
        load_s=engine.load_s,
        plan_s=engine.plan_s,
        run_s=engine.run_s,
        stats=engine.stats,
    )
    say(json.dumps(summary.to_json()) if args.json else summary.to_text())
    return 0


def _check_apart(args: argparse.Namespace) -> None:
    """Raises: ConfigError when --report or --trace would be written over a file of the job."""
    others = {option: path for option, path in (("--report", args.report), ("--trace", args.trace)) if path is not None}
    if others:
        check_apart(resolve_paths(args.input, args.output, args.errors), others)

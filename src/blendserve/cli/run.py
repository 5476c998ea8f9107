"""`blendserve run`: answer every line of a batch file."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from pathlib import Path

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.engine_options import add_engine, add_engine_choice, add_replicas, add_watching, check_options
from blendserve.cli.engine_settings import engine_settings
from blendserve.cli.help import add_two_helps
from blendserve.cli.options import add_chat, add_model, add_reading, read_limits, say, tell
from blendserve.engines.base import RunObserver
from blendserve.planner.policies import POLICY_NAMES

DEFAULT_POLICY = "blend"

MOST_USED = (
    *("output", "errors", "model", "engine", "base_url", "kv_memory", "threads", "dtype", "replicas"),
    *("policy", "ordered", "fresh", "report", "quiet", "json"),
)
"""What `run --help` shows beside the input; `run --help-all` shows the rest too."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help=HELP_BY_COMMAND["run"],
        description="Answer every line of an OpenAI Batch file. A line that cannot be answered becomes a row of the "
        "error file. You may stop the command at any moment: the same command goes on where it stopped.",
        add_help=False,
    )
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="the batch file; may be gzip (.jsonl.gz)")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT.jsonl", help="where answers go (required)"
    )
    parser.add_argument(
        "--errors", type=Path, metavar="ERR.jsonl", help="where error rows go (default: OUT.errors.jsonl)"
    )
    add_model(parser)
    parser.add_argument(
        "--policy", choices=POLICY_NAMES, default=DEFAULT_POLICY, help=f"order of requests (default: {DEFAULT_POLICY})"
    )
    parser.add_argument("--ordered", action="store_true", help="write answers in input order (default: as they finish)")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="discard what an earlier run of this job has finished (default: go on where it stopped)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="show no progress (default: a progress line on standard error)"
    )
    add_chat(parser)
    add_reading(parser)
    add_watching(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object (default: as text)")
    add_engine_choice(parser)
    add_engine(parser)
    add_replicas(parser)
    add_two_helps(parser, MOST_USED)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Run the job. Returns 0 when every line has its row, answered or not; 130, 143, 129 or 138 when interrupted."""
    from blendserve.engines.opening import open_engine
    from blendserve.job.interrupts import JobInterrupted
    from blendserve.offline.batch import run_batch
    from blendserve.report.run_display import RunDisplay
    from blendserve.report.summary import RunSummary

    started_s = time.perf_counter()
    _check_apart(args)
    check_options(args)
    settings = engine_settings(args)
    try:
        with (
            closing(open_engine(settings, notify=tell, observer=_observer(args))) as engine,
            RunDisplay(engine, is_quiet=args.quiet or args.json) as display,
        ):
            report = run_batch(
                args.input,
                args.output,
                errors=args.errors,
                engine=engine,
                policy=args.policy,
                ordered=args.ordered,
                fresh=args.fresh,
                limits=read_limits(args),
                on_progress=display.note,
            )
    except JobInterrupted as interrupt:
        tell("")
        tell(f"blendserve: {interrupt}")
        return interrupt.exit_code
    summary = RunSummary(report, args.policy, time.perf_counter() - started_s, engine.times, engine.stats)
    say(json.dumps(summary.to_json()) if args.json else summary.to_text())
    return 0


def _observer(args: argparse.Namespace) -> RunObserver | None:
    if args.trace is None and args.report is None:
        return None
    from blendserve.report.observer import FileObserver

    return FileObserver(args.input.name, args.trace, args.report)


def _check_apart(args: argparse.Namespace) -> None:
    """Raises: ConfigError when --report or --trace would be written over a file of the job."""
    from blendserve.job.writer import check_apart, resolve_paths

    others = {option: path for option, path in (("--report", args.report), ("--trace", args.trace)) if path is not None}
    if others:
        check_apart(resolve_paths(args.input, args.output, args.errors), others)

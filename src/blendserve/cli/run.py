"""`blendserve run`: answer every line of batch files."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from blendserve.cli.answers_out import print_answer, print_answers_of
from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.engine_options import add_engine, add_engine_choice, add_replicas, add_watching, check_options
from blendserve.cli.engine_settings import engine_settings
from blendserve.cli.help import add_two_helps
from blendserve.cli.options import add_chat, add_model, add_reading, read_limits, say, tell, tell_all
from blendserve.engines.base import RunObserver
from blendserve.errors import ConfigError
from blendserve.job.places import JobFiles, RunOptions, choose_outputs, find_inputs
from blendserve.planner.policies import POLICY_NAMES

if TYPE_CHECKING:
    from blendserve.tables.staging import StagedJob

DEFAULT_POLICY = "blend"
STANDARD_OUTPUT = "-"

MOST_USED = (
    *("output", "errors", "model", "engine", "base_url", "kv_memory", "threads", "dtype", "replicas"),
    *("policy", "ordered", "fresh", "retry_failed", "reuse", "report", "quiet", "json"),
)
"""What `run --help` shows beside the input; `run --help-all` shows the rest too."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help=HELP_BY_COMMAND["run"],
        description="Answer every line of OpenAI Batch files. A line that cannot be answered becomes a row of the "
        "error file. You may stop the command at any moment: the same command goes on where it stopped. It returns 0 "
        "when every line was answered, and 3 when the error file has rows.",
        add_help=False,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="IN.jsonl",
        help="the batch file, plain or compressed (gzip, bzip2, xz, zstd); several files, or a directory of them, are "
        "planned together, and each gets its own output",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT.jsonl",
        help="where answers go: a file; a directory, for IN.out.jsonl in it; or - for standard output as well as "
        "IN.out.jsonl (default: IN.out.jsonl beside the input)",
    )
    parser.add_argument("--errors", metavar="ERR.jsonl", help="where error rows go (default: OUT.errors.jsonl)")
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="DIR",
        help="for inputs and outputs that are URLs, such as s3://bucket/in.jsonl: a directory of this machine for "
        "their copies and the journal (default: none; the journal of files stands beside the output)",
    )
    add_model(parser)
    parser.add_argument(
        "--policy", choices=POLICY_NAMES, default=DEFAULT_POLICY, help=f"order of requests (default: {DEFAULT_POLICY})"
    )
    parser.add_argument("--ordered", action="store_true", help="write answers in input order (default: as they finish)")
    add_going_on(parser)
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


def add_going_on(parser: argparse.ArgumentParser) -> None:
    """What to keep of an earlier run of the job."""
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="discard what an earlier run of this job has finished (default: go on where it stopped)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="try lines again that failed for a reason that may pass: a failure of the engine or the server, a "
        "timeout, too little memory (default: keep their error rows)",
    )
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="the input has changed: keep the answers to lines that have not, and run the others (default: refuse)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the jobs. Returns 0 when every line was answered, 3 when some have error rows; 130, 143, 129 or 138 when
    interrupted.
    """
    from blendserve.engines.opening import open_engine
    from blendserve.job.interrupts import JobInterrupted
    from blendserve.offline.batch import run_files
    from blendserve.report.run_display import RunDisplay
    from blendserve.report.summary import RunSummary

    started_s = time.perf_counter()
    staged = _stage(args)
    files = _find_files(args) if staged is None else [staged.files]
    _check_apart(args, files)
    is_streamed = args.output == STANDARD_OUTPUT
    check_options(args)
    settings = engine_settings(args)
    try:
        with (
            closing(open_engine(settings, notify=tell, observer=_observer(args))) as engine,
            RunDisplay(engine, is_quiet=args.quiet or args.json) as display,
        ):
            reports = run_files(
                files,
                engine=engine,
                policy=args.policy,
                options=RunOptions(args.ordered, args.fresh, args.retry_failed, args.reuse, read_limits(args)),
                on_progress=display.note,
                on_answer=print_answer if is_streamed and not args.ordered else None,
            )
    except JobInterrupted as interrupt:
        tell("")
        tell(f"blendserve: {interrupt}")
        return interrupt.exit_code
    if is_streamed and (args.ordered or reports[0].was_complete):
        print_answers_of(Path(reports[0].output_path))
    if staged is not None:
        reports = [staged.publish(reports[0])]
    summary = RunSummary(reports, args.policy, time.perf_counter() - started_s, engine.times, engine.stats)
    (tell_all if is_streamed else say)(json.dumps(summary.to_json()) if args.json else summary.to_text())
    return summary.exit_code


def _stage(args: argparse.Namespace) -> StagedJob | None:
    """The files of a job of URLs; None where all are files of this machine. Raises: ConfigError."""
    from blendserve.offline.urls import staged_job

    output = None if args.output == STANDARD_OUTPUT else args.output
    return staged_job(args.inputs, output, args.errors, args.journal, is_fresh=args.fresh)


def _find_files(args: argparse.Namespace) -> list[JobFiles]:
    """Inputs with the outputs that belong to them. Raises: ConfigError where they do not fit together."""
    inputs = find_inputs([Path(path) for path in args.inputs])
    if len(inputs) > 1 and (args.errors is not None or args.output == STANDARD_OUTPUT):
        option = "--errors" if args.errors is not None else "-o -"
        raise ConfigError(
            f"{option} is for one input, and these are {len(inputs)}: run them one by one, or leave it out"
        )
    output = None if args.output in (None, STANDARD_OUTPUT) else Path(args.output)
    is_directory = output is not None and args.output.endswith("/")
    outputs = choose_outputs(inputs, output, is_directory=is_directory)
    if output is None and not (args.quiet or args.json):
        for path in outputs:
            tell(f"answers go to {path}")
    errors = None if args.errors is None else Path(args.errors)
    return [JobFiles(path, at, errors) for path, at in zip(inputs, outputs, strict=True)]


def _observer(args: argparse.Namespace) -> RunObserver | None:
    if args.trace is None and args.report is None:
        return None
    from blendserve.report.observer import FileObserver

    name = Path(args.inputs[0]).name if len(args.inputs) == 1 else f"{len(args.inputs)} inputs"
    return FileObserver(name, args.trace, args.report)


def _check_apart(args: argparse.Namespace, files: list[JobFiles]) -> None:
    """Raises: ConfigError when --report or --trace would be written over a file of a job."""
    from blendserve.job.writer import check_apart, resolve_paths

    others = {option: path for option, path in (("--report", args.report), ("--trace", args.trace)) if path is not None}
    for of_job in files if others else ():
        check_apart(resolve_paths(*of_job), others)

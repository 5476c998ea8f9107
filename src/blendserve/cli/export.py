"""`blendserve export`: write the answers that a job has so far."""

from __future__ import annotations

import argparse
from pathlib import Path

from blendserve.cli.answers_out import print_answer
from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.options import say, tell_all
from blendserve.job.export import JobSoFar, export_rows, find_job
from blendserve.job.writer import errors_path_of
from blendserve.report.format import plural


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "export",
        help=HELP_BY_COMMAND["export"],
        description="Write the answers that a job has so far, out of its journal. The job may run meanwhile, or may "
        "have been stopped; nothing of it is changed. Rows stand in the order in which they finished.",
    )
    parser.add_argument(
        "journal", type=Path, metavar="JOURNAL", help="the journal of the job, OUT.jsonl.journal, or its output"
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="a new file for the answers, or - for standard output; error rows go to FILE.errors.jsonl (required)",
    )
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Write what is there. Returns 0."""
    job = find_job(args.journal)
    if args.output == "-":
        rows = [0, 0]
        for is_answer, row in job.rows():
            rows[not is_answer] += 1
            if is_answer:
                print_answer(row)
        tell_all(describe(job, rows[0], rows[1]))
        return 0
    output = Path(args.output)
    num_answers, num_errors = export_rows(job, output, errors_path_of(output))
    say(describe(job, num_answers, num_errors) + f" in {output}")
    return 0


def describe(job: JobSoFar, num_answers: int, num_errors: int) -> str:
    """How far the job is."""
    state = "finished" if job.is_finished else f"{job.num_lines - num_answers - num_errors} are not done yet"
    return (
        f"{plural(job.num_lines, 'line')}, {state}: {plural(num_answers, 'answer')} and "
        f"{plural(num_errors, 'error row')}"
    )

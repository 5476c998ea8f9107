"""`blendserve check`: validate a batch file without running it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.options import (
    add_chat,
    add_model,
    add_reading,
    chat_settings,
    find_model,
    read_limits,
    say,
    served_model,
)
from blendserve.dialect.codec import ModelCodec
from blendserve.job.check import MAX_LISTED_LINES, CheckReport, CodeCount, check_file
from blendserve.models.load import load_model
from blendserve.report.format import printable_line

EXIT_HAS_ERRORS = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "check",
        help=HELP_BY_COMMAND["check"],
        description="Say which lines of a batch file a run on the native engine would answer, and which would become "
        "error rows. Nothing is run. The exit code is 1 when a line has an error.",
    )
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="the batch file; may be gzip (.jsonl.gz)")
    add_model(parser)
    add_chat(parser)
    add_reading(parser)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object (default: as text)")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Check the file. Returns 1 when a line has an error, else 0."""
    chat, model = chat_settings(args), load_model(find_model(args))
    model = replace(model, tokenizer=chat.applied(model.tokenizer))
    served = served_model(args, model)
    codec = ModelCodec(
        model.tokenizer, served.max_model_len, served.abilities.chat, obeys_control_tokens=chat.obeys_control_tokens
    )
    report = check_file(args.input, served, codec, limits=read_limits(args))
    say(json.dumps(asdict(report)) if args.json else describe(report))
    return EXIT_HAS_ERRORS if report.errors else 0


def describe(report: CheckReport) -> str:
    """Counts by error code with line numbers, for a person."""
    lines = [
        f"{report.num_lines} lines, {report.num_valid} valid: {report.num_requests} requests, "
        f"{report.num_prompt_tokens} prompt tokens"
    ]
    by_count = sorted(report.errors.items(), key=lambda item: (-item[1].num_lines, item[0]))
    return "\n".join(lines + [_describe_code(code, count) for code, count in by_count])


def _describe_code(code: str, count: CodeCount) -> str:
    numbers = ", ".join(map(str, count.line_numbers)) + (", ..." if count.num_lines > MAX_LISTED_LINES else "")
    plural = "line" if count.num_lines == 1 else "lines"
    return f"{code}: {count.num_lines} {plural} ({numbers}): {printable_line(count.message)}"

"""`blendserve map`: answer every row of a table."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.engine_options import add_engine, add_engine_choice, add_replicas, add_watching, check_options
from blendserve.cli.engine_settings import engine_settings, planned_config
from blendserve.cli.help import add_two_helps
from blendserve.cli.options import add_chat, add_model, positive_integer, say, tell
from blendserve.errors import ConfigError
from blendserve.planner.policies import POLICY_NAMES

if TYPE_CHECKING:
    from blendserve.engines.base import Engine
    from blendserve.job.job import JobProgress, JobReport
    from blendserve.planner.plan import Plan
    from blendserve.tables.mapping import TableJob
    from blendserve.tables.recipe import Recipe
    from blendserve.tables.trial import Sample

DEFAULT_POLICY = "blend"
MAX_SIMULATED = 2000
"""Rows that --dry-run simulates; it scales their time to all."""
FORMAT_NAMES = ("parquet", "jsonl", "csv", "arrow")
_NUMBERS = ("max_tokens", "temperature", "seed")

MOST_USED = (
    *("output", "prompt", "system", "schema", "unnest", "column", "examples", "max_tokens", "temperature"),
    *("model", "engine", "base_url", "kv_memory", "threads", "dtype", "replicas", "sample", "dry_run"),
    *("fresh", "retry_failed", "quiet", "json"),
)
"""What `map --help` shows beside the input; `map --help-all` shows the rest too."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "map",
        help=HELP_BY_COMMAND["map"],
        description="Answer every row of a table, and write the table with the answers in new columns. A row that "
        "cannot be answered has the reason in the column error. You may stop the command at any moment: the same "
        "command goes on where it stopped, and rows that did not change keep their answers.",
        add_help=False,
    )
    parser.add_argument(
        "input",
        nargs="+",
        metavar="TABLE",
        help="parquet, CSV, JSON lines (.jsonl) or Arrow: files, globs, directories of parts, or URLs such as "
        "s3://bucket/name.parquet",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="where the table with the answers goes: a file that ends in .parquet, .jsonl, .csv or .arrow; another "
        "name is a directory of parts; or a URL (required)",
    )
    _add_question(parser)
    _add_answer(parser)
    _add_parameters(parser)
    parser.add_argument(
        "--sample",
        type=positive_integer,
        metavar="N",
        help="answer N rows drawn evenly over the plan, print them with an estimate for all, and stop (default: answer "
        "all rows)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print tokens, sharing and time, and which order of columns would share more; answer nothing",
    )
    add_model(parser)
    parser.add_argument(
        "--policy", choices=POLICY_NAMES, default=DEFAULT_POLICY, help=f"order of requests (default: {DEFAULT_POLICY})"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="discard what an earlier run of this job has finished (default: go on where it stopped)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="ask rows again that failed for a reason that may pass: a failure of the engine or the server, a timeout, "
        "too little memory (default: keep their errors)",
    )
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="DIR",
        help="where finished answers are kept (default: OUT.journal beside the output; an output behind a URL needs a "
        "directory of this machine)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="show no progress (default: a progress line on standard error)"
    )
    add_watching(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object (default: as text)")
    add_chat(parser)
    add_engine_choice(parser)
    add_engine(parser)
    add_replicas(parser)
    add_two_helps(parser, MOST_USED)
    parser.set_defaults(command=run)


def _add_question(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "question", "one of --prompt, --messages, --prompt-column and --embed is required"
    )
    group.add_argument(
        "--prompt",
        metavar="TEXT|@FILE",
        help="a Jinja template over the row, such as 'Label this review: {{ text }}' (default: none)",
    )
    group.add_argument(
        "--system", metavar="TEXT|@FILE", help="a template for the system message (default: no system message)"
    )
    group.add_argument("--messages", metavar="COLUMN", help="a column of whole conversations (default: none)")
    group.add_argument("--prompt-column", metavar="COLUMN", help="a column of finished prompts (default: none)")
    group.add_argument("--embed", metavar="COLUMN", help="a column of texts to embed (default: none)")
    group.add_argument(
        "--examples",
        metavar="FILE",
        help="answered rows to show the model first: a table with the columns of the prompt, and the answer (default: "
        "none)",
    )
    group.add_argument(
        "--fields",
        metavar="COLUMNS",
        help="the columns that {{ row_fields }} lists, separated by commas (default: those that the template does not "
        "name)",
    )
    group.add_argument(
        "--reorder-fields",
        action="store_true",
        help="list the fields of {{ row_fields }} in the order, row by row, that lets rows share most of their "
        "prompts; this changes prompts (default: in the order of the table)",
    )
    group.add_argument(
        "--id", metavar="COLUMN", help="a column that names rows in messages (default: their file and place)"
    )


def _add_answer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--schema",
        metavar="FILE|JSON",
        help="a JSON schema that answers follow: the answer is then a structure with its types (default: text)",
    )
    group.add_argument(
        "--unnest", action="store_true", help="a column for each field of the schema (default: one column for all)"
    )
    group.add_argument("--column", default="answer", metavar="NAME", help="the answer's column (default: answer)")
    group.add_argument(
        "--prefix",
        default="",
        metavar="TEXT",
        help="before the names of the other new columns: error, finish_reason, prompt_tokens, output_tokens (default: "
        "nothing)",
    )
    group.add_argument(
        "--format", choices=FORMAT_NAMES, help="format of parts; that of one file is in its name (default: parquet)"
    )
    group.add_argument(
        "--rows-per-file",
        type=positive_integer,
        metavar="N",
        help="rows of each part of a directory (default: 1000000)",
    )


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "parameters of requests, as the body of a batch line has them")
    group.add_argument(
        "--max-tokens", type=positive_integer, metavar="N", help="most tokens of an answer (default: up to the context)"
    )
    group.add_argument("--temperature", type=float, metavar="X", help="0 takes the most likely token (default: 1)")
    group.add_argument(
        "--seed", type=int, metavar="N", help="seed of all rows (default: one for each row, by its place)"
    )
    group.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another parameter, such as top_p=0.9; may be repeated (default: none)",
    )
    group.add_argument(
        "--param-column",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="a parameter with a value for each row, such as max_tokens=limit; may be repeated (default: none)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the job. Returns 0 when every row was answered, 3 when some have errors; 130, 143, 129 or 138 when
    interrupted.
    """
    from blendserve.tables.extra import require_data

    started_s = time.perf_counter()
    require_data("`blendserve map` and its tables")
    check_options(args)
    from blendserve.engines.opening import open_engine
    from blendserve.job.interrupts import JobInterrupted
    from blendserve.report.run_display import RunDisplay

    job = table_job(args)
    job.columns()
    job.order(job.requests())
    try:
        with closing(open_engine(engine_settings(args), notify=tell)) as engine:
            if args.dry_run:
                return _dry_run(args, job, engine)
            with RunDisplay(engine, is_quiet=args.quiet or args.json, noun="rows") as display:
                found = _answer(args, job, engine, display.note)
    except JobInterrupted as interrupt:
        tell("")
        tell(f"blendserve: {interrupt}")
        return interrupt.exit_code
    return _say(args, found, engine, time.perf_counter() - started_s)


def _answer(
    args: argparse.Namespace, job: TableJob, engine: Engine, note: Callable[[JobProgress], None]
) -> JobReport | Sample:
    from blendserve.tables.mapping import run_table
    from blendserve.tables.trial import run_sample

    if args.sample is None:
        return run_table(job, engine, args.policy, on_progress=note)
    name = job.source.name
    simulate = partial(_simulated_s, args, name, notify=lambda _: None)
    return run_sample(job, engine, args.policy, args.sample, simulate)


def _say(args: argparse.Namespace, found: JobReport | Sample, engine: Engine, makespan_s: float) -> int:
    """Print what was found. Returns: the exit code."""
    from blendserve.job.job import JobReport
    from blendserve.report.summary import RunSummary
    from blendserve.report.table_text import sample_json, sample_text

    if isinstance(found, JobReport):
        summary = RunSummary([found], args.policy, makespan_s, engine.times, engine.stats)
        say(json.dumps(summary.to_json()) if args.json else summary.to_text())
        return summary.exit_code
    say(json.dumps(sample_json(found)) if args.json else sample_text(found))
    return 0


def _dry_run(args: argparse.Namespace, job: TableJob, engine: Engine) -> int:
    from blendserve.report.table_text import plan_json, plan_text
    from blendserve.tables.trial import plan_table

    found = plan_table(job, engine)
    time_s = None if found.plan is None else _simulated_s(args, job.source.name, found.plan)
    say(
        json.dumps(plan_json(job.source.name, found, time_s))
        if args.json
        else plan_text(job.source.name, found, time_s, args.policy)
    )
    return 0


def _simulated_s(args: argparse.Namespace, name: str, plan: Plan, notify: Callable[[str], None] = tell) -> float | None:
    """The time of the native engine on this machine; None where that is not calibrated."""
    from blendserve.simulator.forecast import forecast, planned_workload, sampled
    from blendserve.simulator.target import THIS_MACHINE, find_machine, find_target

    if args.engine != "native" or args.replicas is not None:
        return None
    target = find_target(args.model, notify=notify)
    try:
        machine = find_machine(THIS_MACHINE, target.spec, kv_dtype=args.kv_dtype, config=planned_config(args))
    except ConfigError:
        return None
    forecasts = forecast(
        planned_workload(name, plan), {"overlapped": machine}, (args.policy,), sampled(MAX_SIMULATED), notify=notify
    )
    return forecasts.runs[0].time_s


def table_job(args: argparse.Namespace) -> TableJob:
    """The job that the options ask for. Raises: ConfigError."""
    from blendserve.tables.layout import Layout
    from blendserve.tables.mapping import TableJob, open_table

    return TableJob(
        source=open_table(args.input),
        output=args.output,
        recipe=recipe_of(args),
        layout=Layout.of(args.output, args.format, args.rows_per_file),
        journal=args.journal,
        unnest=args.unnest,
        prefix=args.prefix,
        is_fresh=args.fresh,
        retries_failed=args.retry_failed,
        inputs=args.input,
        reorders_fields=args.reorder_fields,
    )


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What the options ask about every row. Raises: ConfigError."""
    from blendserve.tables.mapping import read_examples
    from blendserve.tables.recipe import Recipe

    params = {name: getattr(args, name) for name in _NUMBERS if getattr(args, name) is not None}
    return Recipe(
        prompt=_text_or_file(args.prompt, "--prompt"),
        system=_text_or_file(args.system, "--system"),
        messages_column=args.messages,
        prompt_column=args.prompt_column,
        embed_column=args.embed,
        examples=() if args.examples is None else read_examples(args.examples),
        params={**params, **_pairs(args.param, "--param", _json_or_text)},
        param_columns=_pairs(args.param_column, "--param-column", str),
        schema=None if args.schema is None else read_schema(args.schema),
        id_column=args.id,
        fields=() if args.fields is None else tuple(name.strip() for name in args.fields.split(",")),
        answer=args.column,
    )


def read_schema(given: str) -> Any:
    """A schema as text, or the name of its file. Raises: ConfigError."""
    text = given if given.lstrip().startswith("{") else _read_text(given, "--schema")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--schema is no JSON: {error}") from None


def _text_or_file(given: str | None, option: str) -> str | None:
    return _read_text(given[1:], option) if given is not None and given.startswith("@") else given


def _read_text(path: str, option: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{option}: cannot read {path}: {reason}") from None


def _pairs(given: list[str], option: str, read: Callable[[str], Any]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or not name or name in pairs:
            raise ConfigError(f"{option} {text} is not understood: write NAME=VALUE, each name once")
        pairs[name] = read(value)
    return pairs


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text

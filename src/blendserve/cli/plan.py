"""`blendserve plan`: what a run of a batch file would be like, without a model run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.engine_options import add_planned_run, given_run_options
from blendserve.cli.engine_settings import planned_config
from blendserve.cli.options import (
    add_chat,
    add_generation_config,
    add_reading,
    chat_settings,
    local_path,
    positive_integer,
    read_limits,
    say,
    tell,
)
from blendserve.cli.targets import add_target, check_page_path, name_list, write_page
from blendserve.errors import ConfigError
from blendserve.job.batch_input import BatchInput, read_batch
from blendserve.models.hub import DEFAULT_MODEL
from blendserve.models.tokenizer import Tokenizer
from blendserve.planner.plan import Plan
from blendserve.planner.policies import POLICY_NAMES
from blendserve.report.plan_page import plan_page
from blendserve.report.plan_text import PlanReport, assumption_notes, part_notes
from blendserve.simulator.forecast import forecast, planned_workload, sampled
from blendserve.simulator.machine import Machine
from blendserve.simulator.plan_summary import summarize_plan
from blendserve.simulator.planned_file import plan_batch
from blendserve.simulator.target import (
    DEFAULT_HARDWARE,
    THIS_MACHINE,
    Target,
    find_machine,
    find_target,
    find_tokenizer,
    sampling_of,
)

DEFAULT_POLICIES = ("fcfs", "random", "dfs", "lexical-buckets", "paper", "blend")
DEFAULT_MAX_SIMULATED = 4000
"""Six policies on so many requests, and ten times as many steps, are simulated in about a minute on one core."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help=HELP_BY_COMMAND["plan"],
        description="Say what a batch file holds (tokens, shared prefixes, how much compute and memory traffic) and "
        "simulate how long each policy (order of requests) would take on given hardware. Nothing is run; a tokenizer "
        "is read, no weights.",
    )
    parser.add_argument(
        "input", type=local_path, metavar="IN.jsonl", help="the batch file, plain or compressed (gzip, bzip2, xz, zstd)"
    )
    add_target(parser, f"{THIS_MACHINE} if it is calibrated, else {DEFAULT_HARDWARE}", DEFAULT_MODEL.name)
    add_planned_run(parser)
    add_forecast(parser, DEFAULT_POLICIES, DEFAULT_MAX_SIMULATED)
    add_generation_config(parser)
    add_chat(parser)
    add_reading(parser)
    add_output(parser)
    parser.set_defaults(command=run)


def add_forecast(parser: argparse.ArgumentParser, policies: tuple[str, ...], max_simulated: int) -> None:
    """Options of the simulation."""
    group = parser.add_argument_group("simulation")
    group.add_argument(
        "--policy",
        type=name_list(POLICY_NAMES),
        default=policies,
        metavar="NAMES",
        help=f"policies to compare, separated by commas, of {', '.join(POLICY_NAMES)} (default: {','.join(policies)})",
    )
    group.add_argument(
        "--output-tokens",
        type=positive_integer,
        metavar="N",
        help="tokens to assume for answers of unknown length, at most max_tokens (default: a wide distribution)",
    )
    group.add_argument(
        "--max-simulated",
        type=positive_integer,
        default=max_simulated,
        metavar="N",
        help=f"simulate at most this many requests and scale the times to all (default: {max_simulated})",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Options that say where results go."""
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write an HTML page with plots (default: none)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object (default: as text)")


def run(args: argparse.Namespace) -> int:
    """Plan the file. Returns 0."""
    check_page_path(args.html)
    target = find_target(args.model, notify=tell)
    machine = _find_machine(args, target)
    tokenizer, borrowed = find_tokenizer(args.tokenizer, target, notify=tell)
    limits, chat, sampling = read_limits(args), chat_settings(args), sampling_of(target, args.generation_config)
    with read_batch(args.input, target.spec, tokenizer, limits, chat, sampling) as batch:
        plan = plan_batch(batch, machine, args.output_tokens)
        report = _report(args, batch, plan, machine, tokenizer, assumption_notes(plan, args.output_tokens, borrowed))
        if args.html is not None:
            write_page(args.html, plan_page(report, plan, batch.prompts, tokenizer.decode))
        say(json.dumps(report.to_json()) if args.json else report.to_text())
    return 0


def _find_machine(args: argparse.Namespace, target: Target) -> Machine:
    """Raises: ConfigError for options of a run on this machine where the plan is for other hardware."""
    given = given_run_options(args)
    if given and args.hardware not in (None, THIS_MACHINE):
        raise ConfigError(
            f"{given[0]} describes a run on this machine, and --hardware is {args.hardware}: leave one of them out"
        )
    config = planned_config(args) if given or args.hardware == THIS_MACHINE else None
    return find_machine(
        args.hardware, target.spec, tensor_parallel=args.tensor_parallel, kv_dtype=args.kv_dtype, config=config
    )


def _assumed_hardware(args: argparse.Namespace, machine: Machine) -> list[str]:
    """What is assumed where nobody said for which hardware to plan, and this machine was not measured."""
    if args.hardware is not None or machine.hardware.name != DEFAULT_HARDWARE:
        return []
    return [
        f"This machine has not been measured, so the times are of {DEFAULT_HARDWARE}, not of this machine. `blendserve "
        "calibrate` measures it; --hardware names other hardware."
    ]


def _report(
    args: argparse.Namespace, batch: BatchInput, plan: Plan, machine: Machine, tokenizer: Tokenizer, notes: list[str]
) -> PlanReport:
    workload = planned_workload(args.input.name, plan)
    forecasts = forecast(
        workload,
        {"overlapped": machine},
        args.policy,
        sampled(args.max_simulated),
        notify=lambda text: None if args.json else tell(text),
    )
    return PlanReport(
        source=args.input.name,
        num_lines=batch.num_lines,
        num_refused_by_code=batch.num_refused_by_code,
        summary=summarize_plan(plan, batch.prompts, tokenizer.decode),
        forecasts=forecasts,
        notes=[*_assumed_hardware(args, machine), *part_notes(forecasts), *notes],
    )

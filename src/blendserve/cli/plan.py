"""`blendserve plan`: what a run of a batch file would be like, without a model run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from blendserve.cli.options import add_reading, positive_integer, read_limits, say, tell
from blendserve.cli.targets import (
    DEFAULT_HARDWARE,
    THIS_MACHINE,
    add_target,
    check_page_path,
    find_machine,
    find_target,
    find_tokenizer,
    name_list,
    write_page,
)
from blendserve.job.batch_input import BatchInput, read_batch
from blendserve.models.hub import DEFAULT_MODEL
from blendserve.models.tokenizer import Tokenizer
from blendserve.planner.base import RequestTable
from blendserve.planner.lengths import Lengths
from blendserve.planner.plan import Plan, make_plan
from blendserve.planner.policies import POLICY_NAMES
from blendserve.planner.tree import PrefixTree
from blendserve.report.plan_page import plan_page
from blendserve.report.plan_summary import summarize_plan
from blendserve.report.plan_text import LENGTHS_NOTE, PlanReport, part_notes
from blendserve.simulator.forecast import forecast, planned_workload, sampled
from blendserve.simulator.simulate import Machine
from blendserve.simulator.workloads.knowledge import GivenLengths

DEFAULT_POLICIES = ("fcfs", "random", "dfs", "lexical-buckets", "paper", "blend")
DEFAULT_MAX_SIMULATED = 4000
"""Six policies on so many requests, and ten times as many steps, are simulated in about a minute on one core."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="say what a run of a batch file would be like",
        description="Plan a batch file without running it: tokens, prefix sharing, compute density, the two ends of "
        "the order, shared prefixes, and what each policy would take (simulated) on given hardware. Reads a tokenizer, "
        "no weights.",
    )
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="the batch file; may be gzip (.jsonl.gz)")
    add_target(parser, f"{THIS_MACHINE} if it is calibrated, else {DEFAULT_HARDWARE}", DEFAULT_MODEL.name)
    add_forecast(parser, DEFAULT_POLICIES, DEFAULT_MAX_SIMULATED)
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
        help=f"policies to compare, with commas between, of {', '.join(POLICY_NAMES)}; default: {','.join(policies)}",
    )
    group.add_argument(
        "--output-tokens",
        type=positive_integer,
        metavar="N",
        help="assume this length for outputs of unknown length (within max_tokens); default: a wide distribution",
    )
    group.add_argument(
        "--max-simulated",
        type=positive_integer,
        default=max_simulated,
        metavar="N",
        help=f"simulate at most this many requests and scale the times to all ({max_simulated})",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Options that say where results go."""
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Plan the file. Returns 0."""
    check_page_path(args.html)
    target = find_target(args.model)
    machine = find_machine(args, target.spec)
    tokenizer, borrowed = find_tokenizer(args.tokenizer, target)
    with read_batch(args.input, target.spec, tokenizer, read_limits(args)) as batch:
        plan = plan_batch(batch, machine, args.output_tokens)
        report = _report(args, batch, plan, machine, tokenizer, assumption_notes(plan, args.output_tokens, borrowed))
        if args.html is not None:
            write_page(args.html, plan_page(report, plan, batch.prompts, tokenizer.decode))
        say(json.dumps(report.to_json()) if args.json else report.to_text())
    return 0


def plan_batch(batch: BatchInput, machine: Machine, num_output_tokens: int | None) -> Plan:
    """Plan the requests of a file for a machine; `num_output_tokens` is what unknown lengths are assumed to be."""

    def assumed(_: PrefixTree, table: RequestTable) -> Lengths:
        most = np.minimum(np.maximum(table.max_output_tokens, 1), num_output_tokens or 1)
        return GivenLengths(np.where(table.known_output_tokens >= 0, table.known_output_tokens, most))

    tree = PrefixTree.from_flat(batch.prompts)
    lengths = assumed if num_output_tokens else None
    return make_plan(tree, batch.table, machine.cost.cost_model(), lengths=lengths)


def assumption_notes(plan: Plan, num_output_tokens: int | None, borrowed_tokenizer: str | None) -> list[str]:
    """Remarks on what was assumed for want of knowing it."""
    notes = []
    num_unknown = int((plan.table.known_output_tokens < 0).sum())
    if num_unknown and num_output_tokens:
        notes.append(f"Output lengths that no request fixes are taken as {num_output_tokens} tokens, or max_tokens.")
    elif num_unknown:
        notes.append(LENGTHS_NOTE)
    if borrowed_tokenizer is not None:
        notes.append(f"Tokens are counted with the tokenizer of {borrowed_tokenizer}.")
    return notes


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
        notes=[*part_notes(forecasts), *notes],
    )

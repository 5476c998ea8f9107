"""`blendserve simulate`: what a job would take on given hardware, per policy and engine."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.options import (
    add_chat,
    add_generation_config,
    add_reading,
    chat_settings,
    local_path,
    not_negative,
    positive_integer,
    read_limits,
    say,
    tell,
)
from blendserve.cli.plan import add_forecast, add_output
from blendserve.cli.targets import add_target, check_page_path, name_list, write_page
from blendserve.costs.hardware import A100_80G, HARDWARE_BY_NAME
from blendserve.errors import ConfigError
from blendserve.job.batch_input import read_batch
from blendserve.report.plan_text import assumption_notes, part_notes
from blendserve.report.simulate_page import simulate_page
from blendserve.report.simulate_text import POWER_NOTE, SimulateReport
from blendserve.simulator.forecast import Forecasts, Part, forecast, planned_workload, sampled
from blendserve.simulator.machine import ENGINE_KINDS, EngineKind, Machine
from blendserve.simulator.planned_file import plan_batch
from blendserve.simulator.target import DEFAULT_HARDWARE, Target, find_machine, find_target, find_tokenizer, sampling_of
from blendserve.simulator.workloads.blend import blend
from blendserve.simulator.workloads.traces import VIDEO_MEAN_TOKENS
from blendserve.simulator.workloads.workload import Workload

DEFAULT_POLICIES = ("dfs", "random", "paper", "blend")
DEFAULT_MAX_SIMULATED = 5000
DEFAULT_BLEND_REQUESTS = 400_000
DEFAULT_MODEL = "llama-3-8b"
_MIN_VIDEO_SCALE = 0.15
"""Videos of 2,500 tokens still have a density of a third, so that they bring a blend down to 1."""
TRACE_BY_OPTION = {"burstgpt": "burstgpt", "azure": "azure-code", "sharegpt": "sharegpt", "wildchat": "wildchat"}
BLEND_NOTE = (
    "The blend is synthetic: one compute-intensive trace, video generations for the density, exam questions with "
    "shared examples for the sharing. Its density is that of Llama-3-8B on an A100 at datasheet peaks."
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "simulate",
        help=HELP_BY_COMMAND["simulate"],
        description="Simulate a batch file, or a synthetic job, on given hardware: time, tokens/s, GPU-hours, price, "
        "energy, and how near each policy (order of requests) comes to the fastest possible. The code that forms "
        "batches and keeps prefixes is that of real runs; only the time of a step comes from a cost model. No weights "
        "are read.",
    )
    parser.add_argument(
        "input",
        type=local_path,
        nargs="?",
        metavar="IN.jsonl",
        help="a batch file, plain or compressed (gzip, bzip2, xz, zstd)",
    )
    group = parser.add_argument_group(
        "blend",
        "a synthetic job in place of a file, made of requests with much compute and requests with much memory traffic",
    )
    group.add_argument(
        "--blend",
        type=blend_target,
        metavar="DENSITY,SHARING",
        help="compute time over memory time, and the share of prompt tokens that prefixes spare, such as 1.4,0.35 "
        "(default: none, a file is simulated)",
    )
    group.add_argument(
        "--requests",
        type=positive_integer,
        default=DEFAULT_BLEND_REQUESTS,
        metavar="N",
        help=f"requests of the blend (default: {DEFAULT_BLEND_REQUESTS})",
    )
    group.add_argument(
        "--compute-trace",
        choices=tuple(TRACE_BY_OPTION),
        default="burstgpt",
        help="the trace that the requests with much compute follow (default: burstgpt)",
    )
    add_target(parser, DEFAULT_HARDWARE, DEFAULT_MODEL)
    add_forecast(parser, DEFAULT_POLICIES, DEFAULT_MAX_SIMULATED)
    _add_costs(parser)
    add_output(parser)
    add_generation_config(parser)
    add_chat(parser)
    add_reading(parser)
    parser.set_defaults(command=run)


def _add_costs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("costs")
    group.add_argument(
        "--replicas", type=positive_integer, default=1, metavar="N", help="copies of the model (default: 1)"
    )
    group.add_argument(
        "--engine",
        type=name_list(ENGINE_KINDS),
        default=ENGINE_KINDS,
        metavar="NAMES",
        help="kinds of engine to compare, separated by commas: overlapped (compute and memory at once, as NanoFlow "
        "does), sequential (one after the other, as vLLM and SGLang do) (default: both)",
    )
    group.add_argument(
        "--price",
        type=not_negative,
        metavar="RATE",
        help="price of one GPU for one hour, in any currency (default: none)",
    )
    group.add_argument(
        "--watts", type=not_negative, metavar="W", help="watts that one GPU draws (default: its datasheet's)"
    )


def blend_target(text: str) -> tuple[float, float]:
    """An argument such as 1.4,0.35."""
    try:
        density, sharing = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not DENSITY,SHARING; write for example 1.4,0.35") from None
    if not (density > 0 and 0 <= sharing < 1):
        raise argparse.ArgumentTypeError(f"density {density} must be positive and sharing {sharing} in [0, 1)")
    return density, sharing


def run(args: argparse.Namespace) -> int:
    """Simulate the job. Returns 0."""
    if (args.input is None) == (args.blend is None):
        given = "neither" if args.input is None else "both"
        raise ConfigError(f"{given} of IN.jsonl and --blend given; name one job: a batch file or a blend")
    check_page_path(args.html)
    args.hardware = args.hardware or DEFAULT_HARDWARE
    target = find_target(args.model or DEFAULT_MODEL, notify=tell)
    machines: dict[EngineKind, Machine] = {}
    for engine in args.engine:
        machine = find_machine(
            args.hardware, target.spec, engine, tensor_parallel=args.tensor_parallel, kv_dtype=args.kv_dtype
        )
        machines[engine] = _with_costs(args, machine)
    report = _simulate_file(args, target, machines) if args.blend is None else _simulate_blend(args, machines)
    if args.html is not None:
        write_page(args.html, simulate_page(report))
    say(json.dumps(report.to_json()) if args.json else report.to_text())
    return 0


def _simulate_file(args: argparse.Namespace, target: Target, machines: dict[EngineKind, Machine]) -> SimulateReport:
    tokenizer, borrowed = find_tokenizer(args.tokenizer, target, notify=tell)
    machine = next(iter(machines.values()))
    limits, chat, sampling = read_limits(args), chat_settings(args), sampling_of(target, args.generation_config)
    with read_batch(args.input, target.spec, tokenizer, limits, chat, sampling) as batch:
        plan = plan_batch(batch, machine, args.output_tokens)
        workload = planned_workload(args.input.name, plan)
    forecasts = _forecast(args, workload, machines, sampled(args.max_simulated))
    return SimulateReport(
        source=args.input.name,
        forecasts=forecasts,
        has_price=args.price is not None,
        notes=[*_notes(forecasts), *assumption_notes(plan, args.output_tokens, borrowed)],
        num_lines=batch.num_lines,
        num_refused_by_code=batch.num_refused_by_code,
    )


def _simulate_blend(args: argparse.Namespace, machines: dict[EngineKind, Machine]) -> SimulateReport:
    density, sharing = args.blend
    trace = TRACE_BY_OPTION[args.compute_trace]
    workload = blend(density, sharing, args.requests, compute_trace=trace)

    def part_of(whole: Workload, machine: Machine) -> Part:  # noqa: ARG001
        if len(whole) <= args.max_simulated:
            return Part(whole, 1.0)
        shortest = _MIN_VIDEO_SCALE / min(1.0, density)
        factor = min(1.0, max(shortest, math.sqrt(args.max_simulated / args.requests)))
        video_tokens = VIDEO_MEAN_TOKENS * factor
        part = blend(density, sharing, args.max_simulated, compute_trace=trace, video_tokens=video_tokens)
        return Part(part, factor)

    forecasts = _forecast(args, workload, machines, part_of)
    return SimulateReport(
        source=f"a blend with {args.compute_trace}, density {density:g}, sharing {sharing:g}",
        forecasts=forecasts,
        has_price=args.price is not None,
        notes=[*_notes(forecasts), BLEND_NOTE],
    )


def _forecast(
    args: argparse.Namespace,
    workload: Workload,
    machines: dict[EngineKind, Machine],
    part_of: Callable[[Workload, Machine], Part],
) -> Forecasts:
    return forecast(
        workload,
        machines,
        args.policy,
        part_of,
        num_replicas=args.replicas,
        notify=lambda text: None if args.json else tell(text),
    )


def _with_costs(args: argparse.Namespace, machine: Machine) -> Machine:
    hardware = machine.hardware
    if args.price is not None:
        hardware = replace(hardware, price_per_hour=args.price)
    if args.watts is not None:
        hardware = replace(hardware, watts=args.watts)
    return replace(machine, hardware=hardware)


def _notes(forecasts: Forecasts) -> list[str]:
    notes = part_notes(forecasts)
    if forecasts.machine.hardware.watts:
        notes.append(POWER_NOTE)
    if forecasts.machine.hardware.name in HARDWARE_BY_NAME.keys() - {A100_80G.name}:
        notes.append("Shares of peak are those measured on an A100; other GPUs are assumed to reach the same.")
    return notes

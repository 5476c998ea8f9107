"""Options that say which engine answers a batch file, and how; `engine_settings` makes values of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from blendserve.cli.options import (
    add_chat,
    add_dtype,
    add_generation_config,
    add_kv_dtype,
    add_model,
    count,
    not_negative,
    positive_integer,
    positive_seconds,
    size,
)
from blendserve.config import OVERLAP_MODES
from blendserve.engines.settings import ISA_NAMES, MAX_RESTARTS, PLACEMENTS, TASKS, VLLM_SCHEDULERS
from blendserve.errors import ConfigError

ENGINE_NAMES = ("native", "http", "vllm")

ENGINES_BY_OPTION: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("window", "report", "trace", "overlap", "dtype", "kv_dtype", "isa"), ("native",)),
    **dict.fromkeys(("revision", "generation_config"), ("native", "vllm")),
    **dict.fromkeys(
        (
            *("chat_template", "chat_template_kwargs", "template_date"),
            *("tool_format", "reasoning_format", "control_tokens"),
        ),
        ("native", "vllm"),
    ),
    **dict.fromkeys(
        ("max_model_len", "kv_memory", "max_num_seqs", "max_num_batched_tokens", "threads", "no_prefix_caching"),
        ("native", "vllm"),
    ),
    **dict.fromkeys(
        (
            *("base_url", "header", "max_inflight", "kv_tokens", "request_timeout", "max_attempts", "max_outage"),
            "tokenizer",
        ),
        ("http",),
    ),
    **dict.fromkeys(("task", "lora", "vllm_scheduler", "own_process", "vllm_arg", "image_domain"), ("vllm",)),
}
"""Engines that accept each option; unlisted options apply to all."""


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Limits of an engine in this process."""
    group = parser.add_argument_group(
        "limits of the native engine and of vLLM",
        "limits change how long a run takes; with the native engine they never change answers",
    )
    add_limits(group, on_gpus="; vLLM on GPUs: vLLM's own", on_vllm="; vllm: vLLM's own")
    group.add_argument(
        "--no-prefix-caching",
        action="store_true",
        help="compute every prompt in full (default: beginnings that prompts share are computed once)",
    )
    add_generation_config(group)
    native = parser.add_argument_group("native engine")
    add_overlap(native)
    add_dtype(native)
    add_kv_dtype(native)
    native.add_argument(
        "--isa",
        choices=ISA_NAMES,
        default="auto",
        help="instruction set of the kernels (default: auto, the best one of this machine)",
    )


def add_limits(group: argparse._ActionsContainer, *, on_gpus: str = "", on_vllm: str = "") -> None:
    """Limits that `run` and `plan` know; the texts say what vLLM does without them."""
    group.add_argument(
        "--kv-memory",
        type=size,
        metavar="SIZE",
        help=f"memory of the KV cache, such as 4GiB (default: at most half of the free memory{on_gpus})",
    )
    group.add_argument(
        "--max-num-seqs",
        type=positive_integer,
        metavar="REQUESTS",
        help=f"most requests running at once (default: 256{on_vllm})",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=positive_integer,
        metavar="TOKENS",
        help=f"most tokens in one step, which is one forward pass (default: 2048{on_vllm})",
    )
    group.add_argument(
        "--threads",
        type=positive_integer,
        metavar="N",
        help="CPU threads (default: one for every core that this process may use)",
    )


def add_overlap(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--overlap",
        choices=OVERLAP_MODES,
        default="auto",
        help="run matrix products beside attention in each core: auto (in steps where this machine was measured to "
        "save time by it), on (in every step where it can be done) or off (default: auto)",
    )


def add_planned_run(parser: argparse.ArgumentParser) -> None:
    """Options of `run` that change how long it takes, for the plan of a run."""
    group = parser.add_argument_group(
        "run on this machine", "give `plan` the options that you will give `blendserve run`: they change its time"
    )
    add_limits(group)
    add_overlap(group)
    add_dtype(group)


def add_engine_choice(parser: argparse.ArgumentParser) -> None:
    """--engine, and the options of the engines that are not on this machine."""
    parser.add_argument(
        "--engine",
        choices=ENGINE_NAMES,
        default="native",
        help="who answers: native (this machine's CPU), http (an OpenAI-compatible server that runs already, see "
        "--base-url) or vllm (vLLM in this process; needs vLLM installed) (default: native)",
    )
    _add_http(parser)
    _add_vllm(parser)


def _add_http(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "HTTP engine",
        "the API key comes from the environment: BLENDSERVE_API_KEY, or else OPENAI_API_KEY; --model is the model "
        "name to send (default: that of each line)",
    )
    group.add_argument(
        "--base-url",
        metavar="URL",
        help="address of the server, such as http://localhost:8000/v1; a query such as ?api-version=2024-10-21 goes "
        "with every request (no default: --engine http needs it)",
    )
    group.add_argument(
        "--header",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help='a header to send with every request, also written "NAME: VALUE"; may be repeated (default: none)',
    )
    group.add_argument(
        "--max-inflight",
        type=positive_integer,
        default=64,
        metavar="REQUESTS",
        help="most requests that are sent and not yet answered (default: 64)",
    )
    group.add_argument(
        "--kv-tokens",
        type=positive_integer,
        metavar="TOKENS",
        help="tokens that the server's KV memory holds (default: not known, so that only --max-inflight limits)",
    )
    group.add_argument(
        "--request-timeout",
        type=positive_seconds,
        default=600.0,
        metavar="SECONDS",
        help="time limit for one try of a request, to the last byte of its answer (default: 600)",
    )
    group.add_argument(
        "--max-attempts",
        type=positive_integer,
        default=6,
        metavar="TRIES",
        help="tries before a request becomes an error row (default: 6)",
    )
    group.add_argument(
        "--max-outage",
        type=positive_seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for a server that is down before the run ends (default: 600)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="a model whose tokenizer counts prompt tokens for the plan (default: that of --model if it is on this "
        "machine; otherwise four bytes count as a token)",
    )


def _add_vllm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("vLLM engine")
    add_line_abilities(group)
    group.add_argument(
        "--vllm-scheduler",
        choices=VLLM_SCHEDULERS,
        default="front",
        help="front: hand requests to vLLM in the order of the plan; blend: vLLM's own scheduler asks the plan for "
        "the next request, and knows free memory and prefix hits exactly (default: front)",
    )
    group.add_argument(
        "--own-process",
        action="store_true",
        help="run vLLM in a subprocess, so that its crash does not stop the job (default: in this process)",
    )
    group.add_argument(
        "--vllm-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of vLLM's EngineArgs, such as tensor_parallel_size=2; may be repeated (default: none)",
    )


def add_line_abilities(group: argparse._ActionsContainer) -> None:
    """What lines may ask of vLLM beyond text."""
    group.add_argument(
        "--task",
        choices=TASKS,
        default="generate",
        help="what lines ask for: generate (text) or embed (/v1/embeddings) (default: generate)",
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a LoRA adapter, used for lines whose model is NAME; may be repeated (default: none)",
    )
    group.add_argument(
        "--image-domain",
        action="append",
        default=[],
        metavar="HOST",
        help="a host that pictures of lines may be fetched from; may be repeated (default: none: pictures in lines)",
    )


def add_watching(parser: argparse._ActionsContainer) -> None:
    """How a run is planned piece by piece, and what it writes of itself."""
    parser.add_argument(
        "--window",
        type=positive_integer,
        metavar="REQUESTS",
        help="plan this many requests at a time, while others run; for files whose plan would take too long or too "
        "much memory (default: plan the whole file before it runs)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write an HTML page that shows what compute and memory did during the run (default: none)",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a Chrome trace (JSON) of what every thread did, for ui.perfetto.dev (default: none)",
    )


def add_replicas(parser: argparse.ArgumentParser) -> None:
    """Options of copies of the engine."""
    group = parser.add_argument_group(
        "replicas", "several copies of the engine, each with a part of the requests; needs Ray installed"
    )
    group.add_argument(
        "--replicas",
        type=positive_integer,
        metavar="N",
        help="number of copies of the engine (default: one, without Ray)",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="a running Ray cluster, such as auto (default: Ray is started on this machine for the run)",
    )
    group.add_argument(
        "--replica-cpus",
        type=not_negative,
        metavar="CPUS",
        help="CPUs of each replica (default: --threads; without it, as many as leave room for all)",
    )
    group.add_argument(
        "--replica-gpus",
        type=not_negative,
        default=0.0,
        metavar="GPUS",
        help="GPUs of each replica, all on one machine (default: 0)",
    )
    group.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="spread",
        help="spread replicas over as many machines as possible, or pack them on few (default: spread)",
    )
    group.add_argument(
        "--max-restarts",
        type=count,
        default=MAX_RESTARTS,
        metavar="TIMES",
        help="how often a replica's process is started again before the others take its requests (default: "
        f"{MAX_RESTARTS})",
    )


def given_run_options(args: argparse.Namespace) -> list[str]:
    """Options of `add_planned_run` that are not at their defaults, as they are written."""
    parser = argparse.ArgumentParser(add_help=False)
    add_planned_run(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name, default in defaults.items() if getattr(args, name) != default]


def check_options(args: argparse.Namespace) -> None:
    """Raises: ConfigError when an option is given that would have no effect."""
    refuse_ignored(args)
    if args.replicas is None:
        if args.ray_address is not None:
            raise ConfigError("--ray-address says where replicas run: add --replicas N")
    elif args.report or args.trace:
        raise ConfigError("--report and --trace show what one native engine does: leave them out with --replicas")
    elif args.window:
        raise ConfigError("--window and --replicas do not work together: leave one of them out")


def refuse_ignored(args: argparse.Namespace) -> None:
    """Raises: ConfigError when an option is given that the engine ignores."""
    parser = argparse.ArgumentParser(add_help=False)
    for add in (add_model, add_chat, add_engine, add_engine_choice, add_watching):
        add(parser)
    for name, engines in ENGINES_BY_OPTION.items():
        default = parser.get_default(name)
        if args.engine not in engines and getattr(args, name, default) != default:
            kind = f"the {' and '.join(engines)} engine{'s' if len(engines) > 1 else ''}"
            raise ConfigError(
                f"--{name.replace('_', '-')} is an option of {kind}, and the {args.engine} engine ignores it: leave it "
                f"out, or add --engine {engines[0]}"
            )

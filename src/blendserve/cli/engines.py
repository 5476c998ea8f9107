"""Which engine answers a batch file, behind one face: what it may be asked, how it runs, what it tells at the end."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from blendserve.cli.options import add_engine, add_model, add_watching, positive_integer, positive_seconds
from blendserve.dialect.responses import Codec
from blendserve.dialect.schema import ServedModel
from blendserve.engine.stats import RunStats
from blendserve.errors import ConfigError
from blendserve.job.job import JobProgress
from blendserve.job.pending import PendingRequests
from blendserve.planner.plan import Plan
from blendserve.request import SequenceOutput

ENGINE_NAMES = ("native", "http", "vllm")

ENGINES_BY_OPTION: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("window", "report", "trace", "overlap", "dtype", "isa"), ("native",)),
    "revision": ("native", "vllm"),
    **dict.fromkeys(
        ("max_model_len", "kv_memory", "max_num_seqs", "max_num_batched_tokens", "threads", "no_prefix_caching"),
        ("native", "vllm"),
    ),
    **dict.fromkeys(
        ("base_url", "max_inflight", "kv_tokens", "request_timeout", "max_attempts", "max_outage", "tokenizer"),
        ("http",),
    ),
    **dict.fromkeys(("task", "lora", "vllm_scheduler", "own_process", "vllm_arg", "image_domain"), ("vllm",)),
}
"""Who looks at what; options that are not listed are for all."""


class EngineRun(Protocol):
    """One engine for one job. `generate` is called only when requests are left, by a replica for every piece that it is
    given; what it loads stays until `close`. The times and `stats` are of the latest call.

    `identity` and `settings` name all that answers depend on beside the input; `notes` are for the user to read. `plan`
    is the order of requests as one such engine sees it, from which replicas get their parts.
    """

    @property
    def served(self) -> ServedModel: ...
    @property
    def codec(self) -> Codec: ...
    @property
    def identity(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def load_s(self) -> float: ...
    @property
    def plan_s(self) -> float: ...
    @property
    def run_s(self) -> float: ...
    @property
    def stats(self) -> RunStats | None: ...
    def note(self, progress: JobProgress) -> None: ...
    def plan(self, pending: PendingRequests) -> Plan: ...
    def generate(self, pending: PendingRequests) -> Iterator[SequenceOutput]: ...
    def close(self) -> None: ...


def add_engine_choice(parser: argparse.ArgumentParser) -> None:
    """--engine, and the options of the engines that are not on this machine."""
    parser.add_argument(
        "--engine",
        choices=ENGINE_NAMES,
        default="native",
        help="native: this machine's CPU (default); http: an OpenAI-compatible server, see --base-url; vllm: vLLM in "
        "this process (pip install 'blendserve[vllm]')",
    )
    _add_http(parser)
    _add_vllm(parser)


def _add_http(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "HTTP engine", "the key comes from BLENDSERVE_API_KEY, else OPENAI_API_KEY; --model is the name that is sent"
    )
    group.add_argument("--base-url", metavar="URL", help="the server, such as http://localhost:8000/v1")
    group.add_argument(
        "--max-inflight", type=positive_integer, default=64, metavar="N", help="most requests on their way at once (64)"
    )
    group.add_argument(
        "--kv-tokens",
        type=positive_integer,
        default=0,
        metavar="TOKENS",
        help="what the server's KV memory holds; default: not known, only --max-inflight limits",
    )
    group.add_argument(
        "--request-timeout",
        type=positive_seconds,
        default=600.0,
        metavar="SECONDS",
        help="for one try of a request, to the last byte of its answer (600)",
    )
    group.add_argument(
        "--max-attempts", type=positive_integer, default=6, metavar="N", help="tries before a request is an error (6)"
    )
    group.add_argument(
        "--max-outage",
        type=positive_seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for a server that is down (600)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="count prompt tokens with this model's tokenizer; default: that of --model where it is on this machine, "
        "else four bytes count as a token",
    )


def _add_vllm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "vLLM engine", "--kv-memory, --max-num-seqs, --max-num-batched-tokens and --max-model-len are handed to vLLM"
    )
    group.add_argument(
        "--task", choices=("generate", "embed"), default="generate", help="embed: answer /v1/embeddings (generate)"
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an adapter for lines whose model is NAME; may be repeated",
    )
    group.add_argument(
        "--vllm-scheduler",
        choices=("front", "blend"),
        default="front",
        help="front: requests go in from outside as the policy admits them (default); blend: vLLM's scheduler asks the "
        "policy itself, by exact free memory and prefix hits",
    )
    group.add_argument(
        "--own-process", action="store_true", help="run vLLM in a process of its own: its crash is not ours"
    )
    group.add_argument(
        "--image-domain",
        action="append",
        default=[],
        metavar="HOST",
        help="a host that pictures of lines may be fetched from; may be repeated; default: only pictures in lines",
    )
    group.add_argument(
        "--vllm-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of vLLM's EngineArgs, such as tensor_parallel_size=2; may be repeated",
    )


def check_options(args: argparse.Namespace) -> None:
    """Raises: ConfigError when an option is given that the engine would not look at."""
    parser = argparse.ArgumentParser(add_help=False)
    for add in (add_model, add_engine, add_engine_choice, add_watching):
        add(parser)
    for name, engines in ENGINES_BY_OPTION.items():
        if args.engine not in engines and getattr(args, name) != parser.get_default(name):
            kind = f"the {' and '.join(engines)} engine{'s' if len(engines) > 1 else ''}"
            raise ConfigError(
                f"--{name.replace('_', '-')} is for {kind}, and the {args.engine} engine does not look at it: leave it "
                f"out, or add --engine {engines[0]}"
            )


def open_run(args: argparse.Namespace) -> EngineRun:
    """The engine that the arguments ask for, on replicas where they ask for those. Raises: ConfigError."""
    check_options(args)
    if args.replicas is None:
        if args.ray_address is not None:
            raise ConfigError("--ray-address says where replicas run: add --replicas N")
        return open_one(args)
    if args.report or args.trace:
        raise ConfigError("--report and --trace show what one native engine does: leave them out with --replicas")
    if args.window:
        raise ConfigError("--window plans a file piece by piece, --replicas divides one plan of all: leave one out")
    from blendserve.cli.replicas import ReplicatedRun

    return ReplicatedRun(args, open_one(args))


def open_one(args: argparse.Namespace) -> EngineRun:
    """The engine of this process. Raises: ConfigError."""
    if args.engine == "http":
        from blendserve.cli.http_run import open_http_run  # httpx2 takes a tenth of a second to import

        return open_http_run(args)
    if args.engine == "vllm":
        from blendserve.cli.vllm_run import open_vllm_run

        return open_vllm_run(args)
    from blendserve.cli.native_run import open_native_run

    return open_native_run(args)

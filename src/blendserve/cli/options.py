"""Options that several commands share, and the values they stand for."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from blendserve.config import DTYPES, OVERLAP_MODES, EngineConfig, parse_bytes
from blendserve.dialect.schema import ServedModel
from blendserve.engines.replicas.cluster import MAX_RESTARTS, PLACEMENTS
from blendserve.errors import ConfigError
from blendserve.host import cache_dir
from blendserve.job.reader import DEFAULT_MAX_LINE_REQUESTS, DEFAULT_MAX_REQUESTS, ReadLimits
from blendserve.models.fingerprint import fingerprint
from blendserve.models.hub import ModelFiles, resolve
from blendserve.models.load import LoadedModel
from blendserve.models.spec import ModelSpec
from blendserve.report.format import printable, printable_line

ISA_NAMES = ("auto", "portable", "avx2", "avxvnni", "avx512vnni", "avx512bf16")


def size(text: str) -> int:
    """An argument such as 512MiB, in bytes."""
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive_integer(text: str) -> int:
    """An argument that counts something."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return value


def count(text: str) -> int:
    """An argument that counts something, perhaps nothing."""
    return 0 if text.strip() == "0" else positive_integer(text)


def not_negative(text: str) -> float:
    """An argument type: a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is out of range; give 0 or more")
    return value


def positive_seconds(text: str) -> float:
    """An argument that is a duration."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a model directory, a .gguf file, a hub id (owner/name), or a name from `blendserve models`; "
        "default: SmolLM2-135M-Instruct",
    )
    parser.add_argument(
        "--revision",
        metavar="COMMIT",
        help="which version of a hub model: a commit, a tag or a branch; default: newest",
    )
    parser.add_argument(
        "--max-model-len", type=count, default=0, metavar="TOKENS", help="context length; default: the model's"
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """What a file may ask for."""
    group = parser.add_argument_group("reading", "a small file can ask for a lot of work; these bound it")
    group.add_argument(
        "--max-requests",
        type=positive_integer,
        default=DEFAULT_MAX_REQUESTS,
        metavar="N",
        help=f"most answers that the file may ask for, n and lists of prompts counted ({DEFAULT_MAX_REQUESTS})",
    )
    group.add_argument(
        "--max-line-requests",
        type=positive_integer,
        default=DEFAULT_MAX_LINE_REQUESTS,
        metavar="N",
        help=f"most answers that one line may ask for; others become error rows ({DEFAULT_MAX_LINE_REQUESTS})",
    )


def read_limits(args: argparse.Namespace) -> ReadLimits:
    return ReadLimits(max_line_requests=args.max_line_requests, max_requests=args.max_requests)


def add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine", "limits change how long a run takes, never its answers")
    group.add_argument("--kv-memory", type=size, default=0, metavar="SIZE", help="memory of the KV cache, such as 4GiB")
    group.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="most requests running at once (256)")
    group.add_argument(
        "--max-num-batched-tokens", type=int, default=2048, metavar="N", help="most tokens in one step (2048)"
    )
    group.add_argument("--threads", type=int, default=0, metavar="N", help="default: every core this process may use")
    group.add_argument(
        "--no-prefix-caching", action="store_true", help="compute every prompt in full, also where prefixes are shared"
    )
    group.add_argument(
        "--overlap",
        choices=OVERLAP_MODES,
        default="auto",
        help="run matrix products beside attention: auto (default) in steps where `blendserve calibrate` found that it "
        "pays, on wherever it can be done, or off",
    )
    add_dtype(group)
    parser.set_defaults(memory_share=1.0)
    group.add_argument("--isa", choices=ISA_NAMES, default="auto", help="instruction set of the kernels")


def add_dtype(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bf16",
        help="weights of matrix products: bf16 (default), or int8 with 8-bit activations: faster, with other answers",
    )


def add_watching(parser: argparse._ActionsContainer) -> None:
    """How a run is planned piece by piece, and what it writes of itself."""
    parser.add_argument(
        "--window",
        type=positive_integer,
        default=0,
        metavar="N",
        help="plan N requests at a time, each window while others run, instead of the whole file before it; for files "
        "whose plan would take too long or too much memory",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write a page (HTML) of what compute and memory did, measured"
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a Chrome trace (JSON) of ops by worker; for ui.perfetto.dev"
    )


def add_replicas(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "replicas", "copies of the engine, each with a part of the requests; needs Ray: pip install 'blendserve[ray]'"
    )
    group.add_argument("--replicas", type=positive_integer, metavar="N", help="how many; default: one, without Ray")
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="a running Ray cluster, such as auto; default: this machine alone"
    )
    group.add_argument(
        "--replica-cpus",
        type=not_negative,
        metavar="CPUS",
        help="CPUs of each; default: --threads, else as many as leave a place for all",
    )
    group.add_argument(
        "--replica-gpus", type=not_negative, default=0.0, metavar="GPUS", help="GPUs of each, all on one machine (0)"
    )
    group.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="spread",
        help="over as many machines as there are (spread, the default), or on few (pack, Ray's own way)",
    )
    group.add_argument(
        "--max-restarts",
        type=count,
        default=MAX_RESTARTS,
        metavar="N",
        help=f"how often a replica's process is started anew before its requests go to the others ({MAX_RESTARTS})",
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Limits as given. Raises: ConfigError."""
    return EngineConfig(
        kv_memory_bytes=args.kv_memory,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        num_threads=args.threads,
        enable_prefix_caching=not args.no_prefix_caching,
        overlap=args.overlap,
        dtype=args.dtype,
        memory_share=args.memory_share,
    )


def context_length(args: argparse.Namespace, spec: ModelSpec) -> int:
    """Tokens that a prompt and its answer may have. Raises: ConfigError when the model was not made for so many."""
    from blendserve.engine.limits import resolve_limits  # loads the native core, which --help does not need

    return resolve_limits(EngineConfig(max_model_len=args.max_model_len), spec).max_model_len


def find_model(args: argparse.Namespace) -> ModelFiles:
    """The files of the model that --model names, fetched if need be; what takes long is told on standard error.

    Raises: ConfigError when there is no such model, or --revision is for no model of the hub.
    """
    name: str | None = args.model
    if args.revision is not None:
        if name is None or "/" not in name or "@" in name or Path(name).expanduser().exists():
            raise ConfigError(
                f"--revision {args.revision} is for a model of the Hugging Face hub, and --model is "
                f"{name or 'not given'}; give --model owner/name, or leave --revision out"
            )
        name = f"{name}@{args.revision}"
    return resolve(name, cache_dir(), notify=tell)


def identity_of(name: str, files: ModelFiles) -> str:
    """Which model exactly: its name, what its files hold, and the commit of one from the hub."""
    return " ".join([name, fingerprint(files), *([f"revision {files.revision}"] if files.revision else [])])


def notes_of(files: ModelFiles) -> tuple[str, ...]:
    """What the summary says of where the model came from."""
    return (f"Model {files.name.partition('@')[0]} is revision {files.revision}.",) if files.revision else ()


def served_model(args: argparse.Namespace, model: LoadedModel) -> ServedModel:
    """Which names lines may carry: the model's own; any one other name too where the user chose the model.

    Raises: ConfigError when the model was not made for the context length asked for.
    """
    return ServedModel(
        names=(model.spec.name,),
        accepts_any_name=args.model is not None,
        vocab_size=model.spec.vocab_size,
        max_model_len=context_length(args, model.spec),
    )


def tell(text: str) -> None:
    """A line for the person at the terminal, kept out of standard output; lost where nobody reads it any more."""
    with suppress(OSError):
        print(printable_line(text), file=sys.stderr, flush=True)


def say(text: str) -> None:
    """What a command answers, on standard output."""
    print(printable(text))

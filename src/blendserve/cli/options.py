"""Options that several commands share, and the values they stand for."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from blendserve.config import DTYPES, KV_DTYPES, parse_bytes
from blendserve.errors import ConfigError
from blendserve.host import cache_dir
from blendserve.job.reader import DEFAULT_MAX_LINE_REQUESTS, DEFAULT_MAX_REQUESTS, ReadLimits
from blendserve.models.chat_formats import AUTO, REASONING_FORMAT_NAMES, TOOL_FORMAT_NAMES
from blendserve.models.chat_settings import CONTROL_TOKENS, ChatSettings
from blendserve.models.generation_config import FROM_MODEL
from blendserve.models.hub import ModelFiles, resolve
from blendserve.report.format import printable, printable_line


def size(text: str) -> int:
    """An argument such as 512MiB, in bytes."""
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_path(text: str) -> Path:
    """An argument that is a file of this machine: a path would lose a slash of a URL."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is a URL; copy the file to this machine first (`blendserve run` and `map` read URLs)"
        )
    return Path(text)


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
        help="a model directory, a .gguf file, a hub id (owner/name), or a name from `blendserve models` "
        "(default: SmolLM2-135M-Instruct)",
    )
    add_version(parser)


def add_version(parser: argparse.ArgumentParser) -> None:
    """Which version of a model, and how much of its context."""
    parser.add_argument(
        "--revision", metavar="COMMIT", help="version of a hub model: a commit, a tag or a branch (default: the newest)"
    )
    parser.add_argument(
        "--max-model-len",
        type=count,
        metavar="TOKENS",
        help="most tokens of a prompt and its answer together (default: what the model was made for)",
    )


def add_generation_config(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--generation-config",
        default=FROM_MODEL,
        metavar="SOURCE",
        help="where sampling parameters come from that a line does not give: auto (the model's "
        "generation_config.json), vllm (nowhere: temperature 1, top_p 1, and so on), or a directory with a "
        "generation_config.json (default: auto)",
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """What a file may ask for."""
    group = parser.add_argument_group("reading", "limits on the work that a file may ask for")
    group.add_argument(
        "--max-requests",
        type=positive_integer,
        default=DEFAULT_MAX_REQUESTS,
        metavar="N",
        help="most answers that the whole file may ask for; n and lists of prompts count "
        f"(default: {DEFAULT_MAX_REQUESTS})",
    )
    group.add_argument(
        "--max-line-requests",
        type=positive_integer,
        default=DEFAULT_MAX_LINE_REQUESTS,
        metavar="N",
        help="most answers that one line may ask for; a line that asks for more becomes an error row (default: "
        f"{DEFAULT_MAX_LINE_REQUESTS})",
    )


def add_chat(parser: argparse.ArgumentParser) -> None:
    """How conversations become prompts, and how answers are read."""
    group = parser.add_argument_group("chat", "how messages become prompts, and how answers are read")
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja template to use instead of the model's own (default: the model's own)",
    )
    group.add_argument(
        "--chat-template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="variables for the template of every line, such as '{\"enable_thinking\": false}'; a line's own come "
        "first (default: none)",
    )
    group.add_argument(
        "--template-date",
        metavar="DATE",
        help="what templates get as today, such as 2026-11-29 (default: the day on which the job begins)",
    )
    group.add_argument(
        "--tool-format",
        default=AUTO,
        metavar="NAME",
        help=f"how the model writes calls of functions: {', '.join(TOOL_FORMAT_NAMES)}; with --engine vllm also the "
        "name of one of vLLM's tool parsers (default: auto, as its template shows)",
    )
    group.add_argument(
        "--reasoning-format",
        default=AUTO,
        metavar="NAME",
        help="how the model marks its reasoning, which is kept apart from the answer: "
        f"{', '.join(REASONING_FORMAT_NAMES)}; with --engine vllm also the name of one of vLLM's reasoning parsers "
        "(default: auto, as its template or its tokens show)",
    )
    group.add_argument(
        "--control-tokens",
        choices=CONTROL_TOKENS,
        default="text",
        help="what control tokens such as <|im_end|> are in the texts of users and tools: text, or obey, which lets "
        "them end a message as vLLM does (default: text)",
    )


def chat_settings(args: argparse.Namespace) -> ChatSettings:
    """What `add_chat` has read. Raises: ConfigError for a value that cannot work."""
    return ChatSettings(
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
        template_date=args.template_date,
        tool_format=args.tool_format,
        reasoning_format=args.reasoning_format,
        control_tokens=args.control_tokens,
    )


def json_object(text: str) -> dict[str, Any]:
    """An argument that is a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"enable_thinking": false}}')
    return value


def read_limits(args: argparse.Namespace) -> ReadLimits:
    return ReadLimits(max_line_requests=args.max_line_requests, max_requests=args.max_requests)


def add_dtype(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bf16",
        help="weights of matrix products: bf16, or int8, which is faster and gives other answers (default: bf16)",
    )


def add_kv_dtype(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        default="bf16",
        help="numbers in the KV cache: bf16, or int8, which holds nearly twice as many tokens in the same memory, is "
        "read faster, and gives other answers (default: bf16)",
    )


def find_model(args: argparse.Namespace) -> ModelFiles:
    """The files of the model that --model names, fetched if need be; what takes long is told on standard error."""
    return resolve(args.model, cache_dir(), notify=tell, revision=args.revision)


def tell(text: str) -> None:
    """A line for the person at the terminal, kept out of standard output; lost where nobody reads it any more."""
    with suppress(OSError):
        print(printable_line(text), file=sys.stderr, flush=True)


def tell_all(text: str) -> None:
    """What a command answers, on standard error: for a command whose standard output holds something else."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def say(text: str) -> None:
    """What a command answers, on standard output."""
    print(printable(text))

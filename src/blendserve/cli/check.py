"""`blendserve check`: validate a batch file without running it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.engine_options import ENGINE_NAMES, add_line_abilities, refuse_ignored
from blendserve.cli.engine_settings import read_adapters
from blendserve.cli.options import (
    add_chat,
    add_generation_config,
    add_model,
    add_reading,
    chat_settings,
    find_model,
    local_path,
    read_limits,
    say,
)
from blendserve.dialect.codec import ModelCodec
from blendserve.dialect.endpoint import Codec
from blendserve.dialect.schema import ServedModel
from blendserve.engines.settings import NativeSettings, VllmSettings
from blendserve.errors import ConfigError
from blendserve.job.check import MAX_LISTED_LINES, CheckReport, CodeCount, check_file
from blendserve.models.load import load_model, load_tokenizer
from blendserve.models.tokenizer import read_json
from blendserve.report.format import plural, printable_line

EXIT_HAS_ERRORS = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "check",
        help=HELP_BY_COMMAND["check"],
        description="Say which lines of a batch file a run would answer, and which would become error rows. Nothing is "
        "run, and no server is asked. The exit code is 1 when a line has an error.",
    )
    parser.add_argument(
        "input", type=local_path, metavar="IN.jsonl", help="the batch file, plain or compressed (gzip, bzip2, xz, zstd)"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINE_NAMES,
        default="native",
        help="whose rules count: native, vllm (vLLM need not be installed) or http (what a server itself would refuse "
        "is not known) (default: native)",
    )
    add_model(parser)
    add_generation_config(parser)
    add_chat(parser)
    add_line_abilities(parser.add_argument_group("vLLM engine"))
    add_reading(parser)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object (default: as text)")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Check the file. Returns 1 when a line has an error, else 0."""
    refuse_ignored(args)
    served, codec = {"native": _native, "vllm": _vllm, "http": _http}[args.engine](args)
    report = check_file(args.input, served, codec, limits=read_limits(args))
    say(json.dumps(asdict(report)) if args.json else describe(report))
    return EXIT_HAS_ERRORS if report.errors else 0


def _native(args: argparse.Namespace) -> tuple[ServedModel, Codec | None]:
    from blendserve.engines.native.served import served_model_of

    files, chat = find_model(args), chat_settings(args)
    model = load_model(files)
    model = replace(model, tokenizer=chat.applied(model.tokenizer))
    settings = NativeSettings(
        model=args.model, max_model_len=args.max_model_len, generation_config=args.generation_config, chat=chat
    )
    served = served_model_of(settings, files, model)
    return served, ModelCodec(
        model.tokenizer, served.max_model_len, served.abilities.chat, obeys_control_tokens=chat.obeys_control_tokens
    )


def _vllm(args: argparse.Namespace) -> tuple[ServedModel, Codec | None]:
    from blendserve.engines.vllm.codec import VllmCodec
    from blendserve.engines.vllm.engine import served_model_of
    from blendserve.engines.vllm.formats import vllm_formats

    if args.model is None:
        raise ConfigError("--engine vllm needs --model: a Hugging Face directory, or a hub id (owner/name)")
    files = find_model(args)
    if files.is_gguf:
        raise ConfigError(f"{files.path} is a GGUF file; vLLM reads Hugging Face directories: give --model one")
    settings = VllmSettings(
        model=args.model,
        max_model_len=args.max_model_len,
        task=args.task,
        adapters=read_adapters(args.lora),
        image_domains=tuple(args.image_domain),
        generation_config=args.generation_config,
    )
    config, chat = read_json(files.path / "config.json"), chat_settings(args)
    tokenizer = chat.applied(load_tokenizer(files))
    formats = vllm_formats(chat, tokenizer, None, str(files.path))
    served = served_model_of(settings, files, config, formats)
    return served, VllmCodec(
        tokenizer, config, served.max_model_len, formats, obeys_control_tokens=chat.obeys_control_tokens
    )


def _http(args: argparse.Namespace) -> tuple[ServedModel, Codec | None]:
    name = args.model
    return ServedModel((name or "the server's",), accepts_any_name=name is None, is_remote=True), None


def describe(report: CheckReport) -> str:
    """Counts by error code with line numbers, for a person."""
    tokens = report.num_prompt_tokens
    lines = [
        f"{plural(report.num_lines, 'line')}, {report.num_valid} valid: {plural(report.num_requests, 'request')}"
        + ("" if tokens is None else f", {plural(tokens, 'prompt token')}")
    ]
    if report.refusal is not None:
        lines.append(f"a run would refuse the whole file: {printable_line(report.refusal)}")
    by_count = sorted(report.errors.items(), key=lambda item: (-item[1].num_lines, item[0]))
    return "\n".join(lines + [_describe_code(code, count) for code, count in by_count])


def _describe_code(code: str, count: CodeCount) -> str:
    numbers = ", ".join(map(str, count.line_numbers)) + (", ..." if count.num_lines > MAX_LISTED_LINES else "")
    return f"{code}: {plural(count.num_lines, 'line')} ({numbers}): {printable_line(count.message)}"

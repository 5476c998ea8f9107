"""The `blendserve` command: one module per subcommand, each with `add_parser` and functions that return exit codes."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from blendserve.errors import BlendServeError

COMMANDS = ("run", "check", "plan", "simulate", "calibrate", "models")

_OUT_OF_MEMORY = (
    "out of memory; lower --kv-memory, plan in windows (run --window 100000) or use a smaller model. Finished requests "
    "are kept: run the same command again to go on"
)

EXIT_ERROR = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it. Returns the exit code: 0 done, 1 error, 2 usage, 130 interrupted."""
    _open_closed_streams()
    args = _parser().parse_args(argv)
    try:
        code: int = args.command(args)
        sys.stdout.flush()
    except BlendServeError as error:
        print(f"blendserve: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("blendserve: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except OSError as error:  # what no module foresaw, such as a directory that may not be looked into
        place = f"cannot use {os.fspath(error.filename)}" if error.filename else "the system refused"
        print(f"blendserve: {place}: {error.strerror or error}", file=sys.stderr)
        return EXIT_ERROR
    except MemoryError:
        print(f"blendserve: {_OUT_OF_MEMORY}", file=sys.stderr)
        return EXIT_ERROR
    return code


def _open_closed_streams() -> None:
    """Give output and errors a place where the shell closed theirs (`>&-`), lest a file of ours gets their number; and
    let them print file names that are no text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blendserve",
        description="Answer a file of LLM requests for the least machine time: plan the order, overlap compute and "
        "memory, lose nothing.",
    )
    parser.add_argument("--version", action="version", version=f"blendserve {_version()}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"blendserve.cli.{name}").add_parser(subparsers)
    return parser


def _version() -> str:
    try:
        return version("blendserve")
    except PackageNotFoundError:  # run from the sources without an install
        return "unknown"

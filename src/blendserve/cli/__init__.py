"""The `blendserve` command: one module per subcommand, each with `add_parser` and functions that return exit codes."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import NoReturn, TextIO

from blendserve.cli.commands import EXIT_CODES, HELP_BY_COMMAND
from blendserve.cli.words import in_option_words
from blendserve.errors import BlendServeError
from blendserve.report.format import printable_line

_OUT_OF_MEMORY = (
    "out of memory; lower --kv-memory or --max-model-len, plan in windows (run --window 100000) or use a smaller one. "
    "Finished requests are kept: run the same command again to go on"
)

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run it. Returns: one of `EXIT_CODES`."""
    _open_closed_streams()
    try:
        given = sys.argv[1:] if argv is None else argv
        args = _parser(given[0] if given else "").parse_args(given)
        code: int = args.command(args)
        sys.stdout.flush()
    except BlendServeError as error:
        return _fail(in_option_words(str(error)))
    except KeyboardInterrupt:
        with _deaf():
            return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        _let_go(sys.stdout)
        return EXIT_ERROR
    except OSError as error:  # what no module foresaw, such as a directory that may not be looked into
        place = f"cannot use {os.fspath(error.filename)}" if error.filename else "the system refused"
        return _fail(f"{place}: {error.strerror or error}")
    except MemoryError:
        return _fail(_OUT_OF_MEMORY)
    finally:
        _flush_errors()
    return code


def _fail(message: str, code: int = EXIT_ERROR) -> int:
    with suppress(OSError):
        print(printable_line(f"blendserve: {message}"), file=sys.stderr)
    return code


def _flush_errors() -> None:
    """What nobody reads shall not become an error when the interpreter ends."""
    try:
        sys.stderr.flush()
    except OSError:
        _let_go(sys.stderr)


def _let_go(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _deaf() -> Iterator[None]:
    """Let a second Ctrl-C not spoil what the first one has to say."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _open_closed_streams() -> None:
    """Give output and errors a place where the shell closed theirs (`>&-`), lest a file of ours gets their number; and
    let them print file names that are no text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, or of one with the names of the others: their modules take a moment to load."""
    parser = _Parser(
        prog="blendserve",
        description="Answer a file of LLM requests in the least machine time. BlendServe plans the order of all "
        "requests before it runs them. A crash loses no finished answer.",
        epilog="exit codes:\n" + "\n".join(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items()),
        formatter_class=_KeepsLines,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text in HELP_BY_COMMAND.items():
        if command in (None, name):
            import_module(f"blendserve.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"blendserve: {message.removeprefix('argument ')}; see {self.prog} --help\n")


class _KeepsLines(argparse.HelpFormatter):
    """Wraps what is one line, and keeps the lines of what has several."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n".join(line if line.startswith("  ") else fill(line, width, indent) for line in text.split("\n"))


class _Version(argparse.Action):
    """Looks the version up when it is asked for: that alone takes longer than --help."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("blendserve")
        except PackageNotFoundError:  # run from the sources without an install
            found = "unknown"
        print(f"blendserve {found}")
        parser.exit()

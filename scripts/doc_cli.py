"""docs/cli.md from the parsers of the command line: every command, every option, its default."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from blendserve.cli import _parser
from blendserve.cli.commands import EXIT_CODES
from blendserve.cli.map import MOST_USED as MOST_USED_OF_MAP
from blendserve.cli.run import MOST_USED

_MOST_USED = {"run": MOST_USED, "map": MOST_USED_OF_MAP}

_INTRO = """\
# Command line

This page is for people who look up a command or an option. `scripts/write-docs` makes it from the program itself, so it
says what `blendserve COMMAND --help` says. Four commands to begin with:

    blendserve check IN.jsonl                  # which lines would become error rows
    blendserve plan IN.jsonl                   # how long it would take, simulated
    blendserve run IN.jsonl -o OUT.jsonl       # answer every line
    blendserve export OUT.jsonl -o FILE        # the answers so far, also while a job runs
"""
_SIZES = """\
## Sizes, environment, exit codes

A SIZE is a number with an optional unit: `512MiB` and `4GiB` (powers of 1024), `2GB` (powers of 1000), or bytes.

| environment variable | meaning |
|---|---|
| `BLENDSERVE_CACHE` | where models and calibrations are kept (default: `~/.cache/blendserve`) |
| `BLENDSERVE_API_KEY`, `OPENAI_API_KEY` | the key for `--engine http`; the first one counts if both are set |
| `SSL_CERT_FILE` | certificate authorities that `--engine http` trusts |
| `HF_TOKEN` | the key for gated models of the Hugging Face hub |

| exit code | meaning |
|---|---|
"""


def cli_page() -> str:
    """The whole page."""
    parser = _parser()
    parts = [_INTRO, "| command | what it does |", "|---|---|"]
    commands = _commands_of(parser)
    summaries = {choice.dest: choice.help for choice in _choices_of(parser)}
    parts += [f"| [`blendserve {name}`](#blendserve-{name}) | {summaries[name]} |" for name in commands]
    for name, command in commands.items():
        parts += ["", *_command(f"blendserve {name}", command, _MOST_USED.get(name, ()))]
    codes = [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    return "\n".join([*parts, "", _SIZES + "\n".join(codes), ""])


def _command(name: str, parser: argparse.ArgumentParser, most_used: Sequence[str]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield _text(parser.description or "")
    if most_used:
        yield ""
        yield f"Options in **bold** are those that most runs need; `{name} --help` shows them alone."
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._SubParsersAction)]
        if not actions:
            continue
        title = {"positional arguments": "arguments"}.get(group.title or "", group.title or "")
        yield ""
        yield f"| {title} | {_cell(group.description or '')} |"
        yield "|---|---|"
        yield from (f"| {_named(action, most_used)} | {_cell(action.help or '')} |" for action in actions)
    for sub_name, sub in _commands_of(parser).items():
        yield ""
        yield from _command(f"{name} {sub_name}", sub, ())


def _named(action: argparse.Action, most_used: Sequence[str]) -> str:
    value = "" if action.nargs == 0 else str(action.metavar or action.dest)
    if action.choices and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    names = ", ".join(f"`{option} {value}`" if value else f"`{option}`" for option in action.option_strings)
    names = names.replace("|", "\\|") or f"`{value}`"
    return f"**{names}**" if action.dest in most_used else names


def _commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _choices_of(parser: argparse.ArgumentParser) -> Sequence[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action._choices_actions
    return ()


def _text(words: str) -> str:
    return words[:1].upper() + words[1:]


def _cell(words: str) -> str:
    return words.replace("%%", "%").replace("|", "\\|")

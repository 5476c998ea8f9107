"""Two helps of one command: what most people need, and everything."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any


def add_two_helps(parser: argparse.ArgumentParser, most_used: Collection[str]) -> None:
    """Add -h and --help, which show the options that `most_used` names, and --help-all. The parser has no help yet."""
    parser.add_argument(
        "-h", "--help", action=_ShortHelp, most_used=most_used, help="show the options that most runs need, and exit"
    )
    parser.add_argument("--help-all", action="help", help="show all options, and exit")


class _ShortHelp(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, most_used: Collection[str], help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self._shown = {*most_used, dest, "help_all"}

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for group in parser._action_groups:
            for action in group._group_actions:
                if action.option_strings and action.option_strings[-1][2:].replace("-", "_") not in self._shown:
                    action.help = argparse.SUPPRESS
            if all(action.help is argparse.SUPPRESS for action in group._group_actions):
                group.description = None
        parser.print_help()
        parser.exit()

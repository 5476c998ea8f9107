"""`blendserve cancel`: cancel a batch of a Batch API."""

from __future__ import annotations

import argparse
from contextlib import closing

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.options import say
from blendserve.cli.submit import add_server, client_for, describe


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "cancel",
        help=HELP_BY_COMMAND["cancel"],
        description="Cancel a batch of a Batch API. What it has answered is kept.",
    )
    parser.add_argument("id", metavar="ID", help="the batch")
    add_server(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Cancel the batch. Returns 0."""
    with closing(client_for(args)) as client:
        say(describe(client.cancel(args.id)))
    return 0

"""`blendserve batches`: the batches of a Batch API, or one of them and its files."""

from __future__ import annotations

import argparse
import json
from contextlib import closing

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.options import positive_integer, say
from blendserve.cli.submit import add_fetching, add_server, client_for, describe, fetch, wait_and_fetch
from blendserve.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "batches",
        help=HELP_BY_COMMAND["batches"],
        description="List the newest batches of a Batch API, or show one. With -o the files of one that has ended are "
        "fetched.",
    )
    parser.add_argument("id", nargs="?", metavar="ID", help="the batch to show (default: list the newest)")
    add_server(parser)
    parser.add_argument("--limit", type=positive_integer, default=20, metavar="N", help="how many (default: 20)")
    parser.add_argument("--wait", action="store_true", help="wait until the batch has ended (default: do not wait)")
    add_fetching(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Show batches. Returns 0; with --wait 1 for a batch that was not completed."""
    if args.id is None and (args.wait or args.output is not None):
        raise ConfigError("--wait and -o are about one batch: give its ID")
    with closing(client_for(args)) as client:
        if args.id is None:
            for batch in client.batches(args.limit):
                say(json.dumps(batch) if args.json else describe(batch))
            return 0
        if args.wait:
            return wait_and_fetch(client, args.id, args)
        batch = client.batch(args.id)
        say(json.dumps(batch) if args.json else describe(batch))
        if args.output is not None:
            fetch(client, batch, args)
        return 0

"""`blendserve keys`: make, list and revoke the API keys of a service."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.options import positive_integer, say, size, tell
from blendserve.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "keys",
        help=HELP_BY_COMMAND["keys"],
        description="Keys let clients into a service and own what they store: others cannot see it. A service takes "
        "up changes at once.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add = actions.add_parser("add", help="make a key; it is shown once, and stored nowhere")
    add.add_argument("name", metavar="NAME", help="whose key it is")
    _add_data(add)
    add.add_argument("--max-bytes", type=size, metavar="SIZE", help="most that it may store (default: no limit)")
    add.add_argument(
        "--max-queued", type=positive_integer, metavar="N", help="most requests that it may queue (default: no limit)"
    )
    add.add_argument(
        "--max-uploads", type=positive_integer, metavar="N", help="uploads at the same time (default: the service's)"
    )
    add.set_defaults(command=run_add)
    listing = actions.add_parser("list", help="list the keys")
    _add_data(listing)
    listing.add_argument("--json", action="store_true", help="print a JSON array (default: as text)")
    listing.set_defaults(command=run_list)
    revoke = actions.add_parser("revoke", help="delete a key; what it stored can be reached no more")
    revoke.add_argument("name", metavar="NAME", help="the name or the id of the key")
    _add_data(revoke)
    revoke.set_defaults(command=run_revoke)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="the data directory of the service (required)"
    )


def run_add(args: argparse.Namespace) -> int:
    """Make a key and print it. Returns 0."""
    from blendserve.serve.keys import KeyFile

    try:
        args.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {args.data}: {error.strerror}; give --data another directory") from error
    key, secret = KeyFile(args.data).add(
        args.name, max_bytes=args.max_bytes, max_queued_lines=args.max_queued, max_uploads=args.max_uploads
    )
    tell(f"key {key.id} of {key.name}; keep it: it is not shown again")
    say(secret)
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Print one line per key. Returns 0."""
    from blendserve.serve.keys import KeyFile

    keys = KeyFile(args.data).keys()
    if args.json:
        shown = [{"id": key.id, "name": key.name, "hint": key.hint, "created_at": key.created_at} for key in keys]
        say(json.dumps(shown))
        return 0
    for key in keys:
        say(f"{key.id}  {key.hint}...  {time.strftime('%Y-%m-%d', time.gmtime(key.created_at))}  {key.name}")
    if not keys:
        tell("there are no keys: the service answers this machine alone")
    return 0


def run_revoke(args: argparse.Namespace) -> int:
    """Delete a key. Returns 0."""
    from blendserve.serve.keys import KeyFile

    key = KeyFile(args.data).revoke(args.name)
    tell(f"revoked key {key.id} of {key.name}")
    return 0

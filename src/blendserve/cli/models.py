"""`blendserve models`: which models are here, which is the default, and fetching one ahead of time."""

from __future__ import annotations

import argparse

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.options import say, tell
from blendserve.host import cache_dir
from blendserve.models.hub import DEFAULT_MODEL, PACKAGED_MODELS, list_cached, pull


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "models",
        help=HELP_BY_COMMAND["models"],
        description="List the models that you can name without a path, whether each is on this machine, and which is "
        "the default. `blendserve models pull NAME` fetches one ahead of time.",
    )
    actions = parser.add_subparsers(metavar="ACTION")
    fetch = actions.add_parser("pull", help="fetch a model into the cache")
    fetch.add_argument("name", metavar="NAME", help="a name from the list, or a hub id (owner/name)")
    fetch.set_defaults(command=run_pull)
    parser.set_defaults(command=run_list)


def run_list(_: argparse.Namespace) -> int:
    """Print one line per packaged model."""
    path_by_name = {files.name: files.path for files in list_cached(cache_dir())}
    for model in PACKAGED_MODELS:
        mark = " (default)" if model is DEFAULT_MODEL else ""
        where = path_by_name.get(model.name, f"fetched on first use ({model.num_wheel_bytes / 1e6:.0f} MB)")
        say(f"{model.name}{mark}  {model.license}  {where}")
    print("Others: --model takes a directory, a .gguf file, or a hub id (owner/name).")
    return 0


def run_pull(args: argparse.Namespace) -> int:
    """Fetch one model and print where it is."""
    say(str(pull(args.name, cache_dir(), notify=tell).path))
    return 0

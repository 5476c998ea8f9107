"""`blendserve submit`: send a batch file to a Batch API, ours or another, and fetch the answers."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.options import positive_seconds, say, tell
from blendserve.errors import ConfigError

if TYPE_CHECKING:
    from blendserve.serve.client import BatchClient

EXIT_FAILED = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "submit",
        help=HELP_BY_COMMAND["submit"],
        description="Send a batch file to a Batch API: a `blendserve serve`, OpenAI, or another one. The key comes "
        "from the environment: BLENDSERVE_API_KEY, or else OPENAI_API_KEY.",
    )
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="the batch file")
    add_server(parser)
    parser.add_argument("--endpoint", metavar="URL", help="endpoint of the batch (default: the url of the first line)")
    parser.add_argument(
        "--window", default="24h", metavar="TIME", help="completion window: minutes, hours or days (default: 24h)"
    )
    parser.add_argument(
        "--metadata", action="append", default=[], metavar="NAME=TEXT", help="may be repeated (default: none)"
    )
    parser.add_argument("--wait", action="store_true", help="wait until the batch has ended (default: do not wait)")
    add_fetching(parser)
    parser.set_defaults(command=run)


def add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-url",
        default="http://127.0.0.1:8000/v1",
        metavar="URL",
        help="address of the Batch API (default: http://127.0.0.1:8000/v1)",
    )


def add_fetching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT.jsonl", help="where answers go once it has ended (default: nowhere)"
    )
    parser.add_argument(
        "--errors", type=Path, metavar="ERR.jsonl", help="where error rows go (default: OUT.errors.jsonl)"
    )
    parser.add_argument(
        "--poll", type=positive_seconds, default=2.0, metavar="SECONDS", help="how often to ask (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print the batch as one JSON object (default: as text)")


def run(args: argparse.Namespace) -> int:
    """Send the file. Returns 0 when the batch was taken or, with --wait, completed; else 1."""
    from blendserve.serve.client import endpoint_of

    if args.output is not None and not args.wait:
        raise ConfigError("-o needs --wait: answers can be fetched once the batch has ended")
    endpoint = args.endpoint or endpoint_of(args.input)
    metadata = _metadata(args.metadata)
    with closing(client_for(args)) as client:
        file = client.upload(args.input)
        batch = client.create(file["id"], endpoint, args.window, metadata)
        if not args.wait:
            say(json.dumps(batch) if args.json else batch["id"])
            return 0
        tell(f"batch {batch['id']}; if you stop waiting: blendserve batches {batch['id']} --wait")
        return wait_and_fetch(client, batch["id"], args)


def client_for(args: argparse.Namespace) -> BatchClient:
    """Raises: ConfigError for an address or a key that cannot be."""
    from blendserve.engines.http.address import ServerAddress
    from blendserve.engines.http.credentials import find_credentials
    from blendserve.serve.client import BatchClient

    address = ServerAddress.parse(args.base_url)
    return BatchClient(address, find_credentials(os.environ, address))


def wait_and_fetch(client: BatchClient, id: str, args: argparse.Namespace) -> int:
    """Wait for the end of a batch, and write its files. Returns 0 when it was completed, else 1."""
    shown = [""]

    def notify(batch: dict[str, Any]) -> None:
        text = describe(batch)
        if text != shown[0]:
            tell(text)
            shown[0] = text

    batch = client.wait(id, args.poll, notify)
    for error in ((batch.get("errors") or {}).get("data") or [])[:10]:
        place = f"line {error['line']}: " if error.get("line") else ""
        tell(f"{place}{error.get('message')}")
    if args.output is not None:
        fetch(client, batch, args)
    if args.json:
        say(json.dumps(batch))
    return 0 if batch["status"] == "completed" else EXIT_FAILED


def fetch(client: BatchClient, batch: dict[str, Any], args: argparse.Namespace) -> None:
    errors = args.errors or args.output.with_name(args.output.name.removesuffix(".jsonl") + ".errors.jsonl")
    for field, path in (("output_file_id", args.output), ("error_file_id", errors)):
        if batch.get(field):
            num_bytes = client.download(batch[field], path)
            tell(f"wrote {path} ({num_bytes} bytes)")


def describe(batch: dict[str, Any]) -> str:
    """One line for a person."""
    counts = batch.get("request_counts") or {}
    done, failed, total = (counts.get(name) or 0 for name in ("completed", "failed", "total"))
    return f"{batch['id']}  {batch['status']:<11}  {done + failed} of {total} done, {failed} failed"


def _metadata(options: list[str]) -> dict[str, str]:
    found = {}
    for option in options:
        name, separator, text = option.partition("=")
        if not separator or not name:
            raise ConfigError(f"--metadata {option} is not understood: write NAME=TEXT")
        found[name] = text
    return found

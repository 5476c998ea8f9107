"""`blendserve serve`: the Batch API as a service."""

from __future__ import annotations

import argparse
import copy
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from blendserve.cli.commands import HELP_BY_COMMAND
from blendserve.cli.engine_options import add_engine, add_engine_choice, add_replicas, check_options
from blendserve.cli.engine_settings import engine_settings
from blendserve.cli.help import add_two_helps
from blendserve.cli.options import add_chat, add_version, positive_integer, positive_seconds, size, tell
from blendserve.errors import ConfigError
from blendserve.planner.policies import POLICY_NAMES

if TYPE_CHECKING:
    from blendserve.serve.settings import Limits, ModelChoice, ServeSettings, WebhookSettings

DEFAULT_POLICY = "blend"
DEFAULT_NAME = "SmolLM2-135M-Instruct"
MISSING = "`blendserve serve` needs packages that are not installed: pip install 'blendserve[serve]'"

MOST_USED = (
    *("data", "model", "engine", "base_url", "host", "port", "kv_memory", "threads", "dtype", "quota"),
    *("webhook", "tls_cert", "tls_key"),
)
"""What `serve --help` shows; `serve --help-all` shows the rest too."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help=HELP_BY_COMMAND["serve"],
        description="Serve OpenAI's Batch API: files, uploads, batches, and a dashboard at /. All queued batches of a "
        "model are planned together. You may stop the service, or kill it, at any moment: it goes on where it was.",
        add_help=False,
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="where files, batches and keys are kept (required)"
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[NAME=]MODEL",
        help="a model directory, a .gguf file, a hub id (owner/name), or a name from `blendserve models`; NAME is what "
        "clients call it; may be repeated: one model is loaded at a time (default: SmolLM2-135M-Instruct)",
    )
    add_version(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=positive_integer, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--policy", choices=POLICY_NAMES, default=DEFAULT_POLICY, help=f"order of requests (default: {DEFAULT_POLICY})"
    )
    _add_limits(parser)
    _add_queue(parser)
    _add_webhooks(parser)
    tls = parser.add_argument_group("TLS", "both or neither; a proxy may do it instead")
    tls.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain in PEM (default: none)")
    tls.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key in PEM (default: none)")
    add_chat(parser)
    add_engine_choice(parser)
    add_engine(parser)
    add_replicas(parser)
    add_two_helps(parser, MOST_USED)
    parser.set_defaults(command=run, window=None, report=None, trace=None)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("storage", "how much clients may store, and how long it stays")
    group.add_argument("--quota", type=size, metavar="SIZE", help="bytes of all files (default: what the disk holds)")
    group.add_argument(
        "--min-free", type=size, default=256 << 20, metavar="SIZE", help="space left free on the disk (default: 256MiB)"
    )
    group.add_argument("--max-file", type=size, default=4 << 30, metavar="SIZE", help="largest file (default: 4GiB)")
    group.add_argument(
        "--max-batch-lines",
        type=positive_integer,
        default=5_000_000,
        metavar="N",
        help="most lines of a batch (default: 5000000)",
    )
    group.add_argument(
        "--keep-days", type=positive_integer, default=30, metavar="DAYS", help="how long files stay (default: 30)"
    )
    group.add_argument(
        "--max-uploads",
        type=positive_integer,
        default=8,
        metavar="N",
        help="uploads at the same time, for each key (default: 8)",
    )


def _add_queue(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("queue")
    group.add_argument(
        "--refuse-late",
        action="store_true",
        help="refuse a batch that would end after its completion window (default: take it, and flag it)",
    )
    group.add_argument(
        "--round",
        type=positive_seconds,
        default=300.0,
        metavar="SECONDS",
        help="work that is planned at a time where several keys wait, so that each gets its share (default: 300)",
    )


def _add_webhooks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "webhooks",
        "ends of batches are sent to a URL, signed with the secret in BLENDSERVE_WEBHOOK_SECRET (whsec_...), or else "
        "with the one that the service keeps in DIR/webhook.secret",
    )
    group.add_argument("--webhook", metavar="URL", help="where ends of batches are sent (default: nowhere)")
    group.add_argument(
        "--webhook-private",
        action="store_true",
        help="let --webhook lead to an address of this machine or of a private network (default: refuse it)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it. Returns 0."""
    try:
        from blendserve.serve.server import serve
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("blendserve"):
            raise
        raise ConfigError(MISSING) from None
    settings = serve_settings(args)
    scheme = "http" if settings.certificate is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    names = ", ".join(model.name for model in settings.models)
    return serve(settings, lambda: tell(f"serving {names} at {scheme}://{host}:{settings.port}/v1 (Ctrl-C stops)"))


def serve_settings(args: argparse.Namespace) -> ServeSettings:
    """What the options say. Raises: ConfigError."""
    from blendserve.serve.settings import ServeSettings

    return ServeSettings(
        data=args.data,
        models=tuple(_models(args)),
        host=args.host,
        port=args.port,
        policy=args.policy,
        limits=_limits(args),
        webhook=_webhook(args),
        refuses_late=args.refuse_late,
        round_s=args.round,
        certificate=args.tls_cert,
        private_key=args.tls_key,
    )


def _models(args: argparse.Namespace) -> list[ModelChoice]:
    from blendserve.serve.settings import ModelChoice

    found = []
    for text in args.model or [None]:
        name, model = _named(text)
        _check_model(args.engine, model)
        of_model = copy.copy(args)
        of_model.model = model
        check_options(of_model)
        accepts_any = args.engine == "http" and model is None
        shown = name or (args.engine if accepts_any else DEFAULT_NAME)
        aliases = () if model is None or model == shown else (model,)
        found.append(ModelChoice(shown, engine_settings(of_model), aliases, accepts_any))
    return found


def _check_model(engine: str, model: str | None) -> None:
    """Raises: ConfigError for a model that cannot be there, though another one may be loaded first."""
    if engine == "native" and model is not None:
        from blendserve.models.hub import check_name

        check_name(model)


def _named(text: str | None) -> tuple[str | None, str | None]:
    """[NAME=]MODEL -> name and model; a directory or file is called by its last part."""
    if text is None:
        return None, None
    name, separator, model = text.partition("=")
    if not separator:
        model = text
        name = Path(text).name.removesuffix(".gguf") if Path(text).exists() else text
    if not name or not model:
        raise ConfigError(f"--model {text} is not understood: write MODEL, or NAME=MODEL")
    return name, model


def _limits(args: argparse.Namespace) -> Limits:
    from blendserve.serve.settings import DAY_S, Limits

    return Limits(
        max_file_bytes=args.max_file,
        max_batch_lines=args.max_batch_lines,
        quota_bytes=args.quota,
        min_free_bytes=args.min_free,
        max_uploads=args.max_uploads,
        file_lifetime_s=args.keep_days * DAY_S,
    )


def _webhook(args: argparse.Namespace) -> WebhookSettings | None:
    if args.webhook is None:
        return None
    from blendserve.serve.settings import WebhookSettings
    from blendserve.serve.webhooks import parse_url, secret_bytes

    parse_url(args.webhook)
    secret = os.environ.get("BLENDSERVE_WEBHOOK_SECRET") or _kept_secret(args.data)
    secret_bytes(secret)
    return WebhookSettings(args.webhook, secret, args.webhook_private)


def _kept_secret(data: Path) -> str:
    """The secret of a data directory, made when it is first needed."""
    import base64

    from blendserve.job.disk import replace_durably

    path = data / "webhook.secret"
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            replace_durably(path, f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}\n".encode())
            tell(f"made a secret for webhooks; receivers need it: {path}")
        return path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"cannot use {path}: {error.strerror}; give --data another directory") from error

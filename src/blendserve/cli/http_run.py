"""`--engine http`: the job is answered by an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

from blendserve.cli.options import tell
from blendserve.dialect.schema import ServedModel
from blendserve.engines.estimates import EstimatingCodec, remote_cost, remote_table
from blendserve.engines.http.client import ServerAddress, find_api_key
from blendserve.engines.http.dispatch import HttpEngine, HttpSettings
from blendserve.engines.http.pacing import RetrySettings
from blendserve.errors import BlendServeError, ConfigError
from blendserve.host import cache_dir
from blendserve.job.job import JobProgress
from blendserve.job.pending import PendingRequests, plan_pending
from blendserve.models.hub import find_local, resolve
from blendserve.models.load import load_tokenizer
from blendserve.models.tokenizer import Tokenizer
from blendserve.planner.plan import Plan
from blendserve.planner.policies import make_policy
from blendserve.report.progress import Progress, Snapshot
from blendserve.request import SequenceOutput


def open_http_run(args: argparse.Namespace) -> HttpRun:
    """Read the arguments and the environment; nothing is sent yet. Raises: ConfigError."""
    if args.base_url is None:
        raise ConfigError("--engine http needs the server's address: --base-url http://localhost:8000/v1")
    address = ServerAddress.parse(args.base_url)
    settings = HttpSettings(
        max_inflight=args.max_inflight,
        kv_tokens=args.kv_tokens,
        timeout_s=args.request_timeout,
        retry=RetrySettings(max_attempts=args.max_attempts, max_outage_s=args.max_outage),
    )
    engine = HttpEngine(address, find_api_key(os.environ, address), settings, notify=tell)
    return HttpRun(args, engine, _find_tokenizer(args))


def _find_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """The one that --tokenizer names; else that of --model, where nothing need be fetched for it."""
    if args.tokenizer is not None:
        return load_tokenizer(resolve(args.tokenizer, cache_dir(), notify=tell))
    try:
        files = find_local(args.model, cache_dir()) if args.model is not None else None
        return load_tokenizer(files) if files is not None else None
    except BlendServeError:
        return None  # planning does with less


class HttpRun:
    """The server's part of a job: planned only when requests are left to run, timed, and watched."""

    def __init__(self, args: argparse.Namespace, engine: HttpEngine, tokenizer: Tokenizer | None) -> None:
        model: str | None = args.model
        self.served = ServedModel(names=(model or "the server's",), accepts_any_name=model is None, is_remote=True)
        self.codec = EstimatingCodec(tokenizer)
        self.identity = model or "as each line says"
        self.settings: dict[str, Any] = {"engine": "http", "base_url": engine.address.base_url}
        self.load_s = self.plan_s = self.run_s = 0.0
        self.stats = None
        self._engine = engine
        self._has_tokenizer = tokenizer is not None
        self._policy: str = args.policy
        self._is_quiet: bool = args.quiet or args.json
        self._progress = JobProgress(0, 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was sent and what it took, where anything was."""
        stats = self._engine.stats
        if not stats.num_sent:
            return ()
        counted = "the tokenizer" if self._has_tokenizer else "four bytes each, for want of a tokenizer"
        return (
            f"{stats.num_sent} requests sent to {self._engine.address.base_url}, at most {stats.max_inflight} at once: "
            f"{stats.num_throttled} throttled, {stats.num_failures} failed tries; prompt tokens planned by {counted}",
        )

    def note(self, progress: JobProgress) -> None:
        """Take the job's count of what is done."""
        self._progress = progress

    def generate(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        """Yield the ends of `pending` as they come."""
        started_s = time.perf_counter()
        plan = self.plan(pending)
        planned_s = time.perf_counter()
        self.plan_s = planned_s - started_s
        try:
            with Progress(lambda: self._snapshot(plan), is_quiet=self._is_quiet):
                yield from self._engine.run(pending, plan, make_policy(self._policy, plan))
        finally:
            self.run_s = time.perf_counter() - planned_s

    def plan(self, pending: PendingRequests) -> Plan:
        """The order of `pending` on a server of which little is known."""
        return plan_pending(pending, remote_table(pending), remote_cost())

    def close(self) -> None:
        """Nothing stays open between runs."""

    def _snapshot(self, plan: Plan) -> Snapshot:
        progress, window = self._progress, self._engine.window
        num_tokens = progress.num_prompt_tokens + progress.num_output_tokens
        expected = float(plan.expected_output_tokens.sum() + plan.table.num_prompt_tokens.sum())
        return Snapshot(
            num_done=progress.num_done,
            num_requests=progress.num_requests,
            num_tokens=num_tokens,
            num_expected_tokens=max(0.0, expected - num_tokens),
            num_running=window.num_running if window else 0,
            kv_use=window.kv_use if window else 0.0,
            prefix_hit_rate=progress.num_cached_tokens / max(1, progress.num_prompt_tokens),
        )

"""The HTTP engine's part of a job: an OpenAI-compatible server, planned only when requests are left to run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from blendserve.dialect.schema import ServedModel
from blendserve.engines.base import EngineStatus, EngineTimes, Notify
from blendserve.engines.estimates import EstimatingCodec, remote_cost, remote_table
from blendserve.engines.http.address import ServerAddress
from blendserve.engines.http.credentials import find_credentials
from blendserve.engines.http.dispatch import HttpDispatcher, HttpLimits
from blendserve.engines.http.pacing import RetrySettings
from blendserve.engines.settings import HttpSettings
from blendserve.errors import BlendServeError
from blendserve.host import cache_dir
from blendserve.job.pending import PendingRequests, plan_pending
from blendserve.models.hub import find_local, resolve
from blendserve.models.load import load_tokenizer
from blendserve.models.tokenizer import Tokenizer
from blendserve.planner.plan import Plan
from blendserve.planner.policies import make_policy
from blendserve.request import SequenceOutput


def open_http(settings: HttpSettings, *, notify: Notify) -> HttpEngine:
    """Read the key from the environment and find a tokenizer; nothing is sent yet. Raises: ConfigError."""
    address = ServerAddress.parse(settings.base_url)
    limits = HttpLimits(
        max_inflight=settings.max_inflight,
        kv_tokens=settings.kv_tokens or 0,
        timeout_s=settings.request_timeout_s,
        retry=RetrySettings(max_attempts=settings.max_attempts, max_outage_s=settings.max_outage_s),
    )
    dispatcher = HttpDispatcher(address, find_credentials(os.environ, address, settings.headers), limits, notify=notify)
    return HttpEngine(settings.model, dispatcher, _find_tokenizer(settings, notify))


def _find_tokenizer(settings: HttpSettings, notify: Notify) -> Tokenizer | None:
    """The one that was asked for; else that of the model, where nothing need be fetched for it."""
    if settings.tokenizer is not None:
        return load_tokenizer(resolve(settings.tokenizer, cache_dir(), notify=notify))
    try:
        files = find_local(settings.model, cache_dir()) if settings.model is not None else None
        return load_tokenizer(files) if files is not None else None
    except BlendServeError:
        return None  # planning does with less


class HttpEngine:
    """An `Engine` in front of one server."""

    def __init__(self, model: str | None, dispatcher: HttpDispatcher, tokenizer: Tokenizer | None) -> None:
        self.served = ServedModel(names=(model or "the server's",), accepts_any_name=model is None, is_remote=True)
        self.codec = EstimatingCodec(tokenizer)
        self.identity = model or "as each line says"
        self.settings: dict[str, Any] = {"engine": "http", "base_url": str(dispatcher.address)}
        self.capacity_bytes = 0
        self.times = EngineTimes()
        self.stats = None
        self._dispatcher = dispatcher
        self._has_tokenizer = tokenizer is not None
        self._plan: Plan | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What was sent and what it took, where anything was."""
        stats = self._dispatcher.stats
        if not stats.num_sent:
            return ()
        counted = "the tokenizer" if self._has_tokenizer else "four bytes each, for want of a tokenizer"
        return (
            f"{stats.num_sent} requests sent to {self._dispatcher.address.base_url}, at most {stats.max_inflight} at "
            f"once: {stats.num_throttled} throttled, {stats.num_failures} failed tries; prompt tokens planned by "
            f"{counted}",
        )

    def generate(self, pending: PendingRequests, policy: str) -> Iterator[SequenceOutput]:
        """Yield the ends of `pending` as they come."""
        started_s = time.perf_counter()
        plan = self._plan = self.plan(pending)
        planned_s = time.perf_counter()
        self.times = EngineTimes(plan_s=planned_s - started_s)
        try:
            yield from self._dispatcher.run(pending, plan, make_policy(policy, plan))
        finally:
            self.times = self.times._replace(run_s=time.perf_counter() - planned_s)

    def plan(self, pending: PendingRequests) -> Plan:
        """The order of `pending` on a server of which little is known."""
        return plan_pending(pending, remote_table(pending), remote_cost())

    def status(self) -> EngineStatus | None:
        """What is on its way now."""
        plan, inflight = self._plan, self._dispatcher.inflight
        if plan is None:
            return None
        return EngineStatus(
            num_running=inflight.num_running if inflight else 0,
            num_expected_tokens=float(plan.expected_output_tokens.sum() + plan.table.num_prompt_tokens.sum()),
            kv_use=inflight.kv_use if inflight else 0.0,
        )

    def close(self) -> None:
        """Nothing stays open between runs."""

"""Single requests on the service's side: handed to the engine process, and heard of piece by piece."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from blendserve.serve.engine_host import Died
from blendserve.serve.failures import ApiError
from blendserve.serve.messages import Ask, Forget, Piece, Reply, Report
from blendserve.serve.records import new_id
from blendserve.serve.scheduler import Scheduler
from blendserve.serve.settings import ModelChoice

MAX_ASKED = 256
READY_S = 60.0
"""So long a request waits for an engine that is starting."""
_POLL_S = 0.05

Heard = asyncio.Queue[Piece | Reply]


class Asked(NamedTuple):
    """A request that the engine has. Its answer carries `created`, and ids that are made of `id`."""

    id: str
    created: int
    heard: Heard


class Asking:
    """Requests that are asked now, by id."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._heard: dict[str, Heard] = {}

    def hear(self, report: Report | Died) -> None:
        """Called with everything that the engine process says."""
        match report:
            case Piece(id) | Reply(id):
                if id in self._heard:
                    self._heard[id].put_nowait(report)
            case Died():
                error = ApiError(503, "The engine stopped; send the request again.", code="engine_failed")
                for id, heard in self._heard.items():
                    heard.put_nowait(Reply(id, 503, error.to_json()))

    @asynccontextmanager
    async def asked(
        self, model: ModelChoice, url: str, body: Mapping[str, Any], *, is_streamed: bool
    ) -> AsyncIterator[Asked]:
        """Ask the engine; yields where its answer is heard. Raises: ApiError where it cannot be asked now."""
        await self._check_ready(model)
        if len(self._heard) >= MAX_ASKED:
            raise ApiError(
                429,
                f"{MAX_ASKED} requests are being answered.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        asked = Asked(new_id("ask"), int(time.time()), asyncio.Queue())
        id = asked.id
        self._heard[id] = asked.heard
        try:
            self._scheduler.host.send(Ask(id, asked.created, url, body, is_streamed))
            yield asked
        finally:
            del self._heard[id]
            self._scheduler.host.send(Forget(id))

    async def _check_ready(self, model: ModelChoice) -> None:
        """Wait for an engine that is starting; have the model loaded where nothing else runs. Raises: ApiError."""
        scheduler = self._scheduler
        deadline_s = time.monotonic() + READY_S
        while not (scheduler.is_ready and scheduler.has_model(model)):
            if scheduler.is_ready and (self._heard or not scheduler.load(model)):
                message = f"The model {model.name} is not loaded, because another one is at work; try again later."
                raise ApiError(503, message, code="model_not_loaded", headers={"Retry-After": "30"})
            if time.monotonic() > deadline_s:
                reason = scheduler.trouble or "it is loading"
                raise ApiError(
                    503, f"The engine is not ready: {reason}.", code="not_ready", headers={"Retry-After": "10"}
                )
            await asyncio.sleep(_POLL_S)
        if not scheduler.can_ask:
            raise ApiError(
                501,
                "Replicas answer batches only; without --replicas every engine answers single requests too.",
                code="not_supported",
            )

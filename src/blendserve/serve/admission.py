"""Which batches are taken: those that a key may queue, that can end in time, and that no earlier request has made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from blendserve.serve.asked import read_asked
from blendserve.serve.caller import Caller
from blendserve.serve.clock import Clock
from blendserve.serve.failures import ApiError, invalid
from blendserve.serve.library import Library
from blendserve.serve.records import INPUT_PURPOSE, BatchRecord, ReplyRecord
from blendserve.serve.settings import DAY_S, ServeSettings
from blendserve.serve.store import Store

ACTIVE = ("validating", "in_progress", "cancelling", "finalizing")
SAME_REQUEST_S = 60

Forecast = Callable[[Caller, str | None, int, float], float | None]
"""Seconds until a batch of a model with so many lines, due at a deadline, would end; None where nothing is known."""


class Admission:
    """Reads what is asked for, and holds it against what is there."""

    def __init__(self, store: Store, library: Library, settings: ServeSettings, clock: Clock) -> None:
        self._store = store
        self._library = library
        self._settings = settings
        self._clock = clock

    def read(self, caller: Caller, body: Mapping[str, Any]) -> BatchRecord:
        """A batch without a name, as the body asks for it. Raises: ApiError."""
        asked = read_asked(body)
        file = self._library.file(caller, asked.input_file_id)
        if file.purpose != INPUT_PURPOSE:
            raise invalid(f"File {file.id} has the purpose {file.purpose!r}; it must be 'batch'.", "input_file_id")
        now = int(self._clock())
        return BatchRecord(
            id="",
            owner=caller.owner,
            created_at=now,
            input_file_id=file.id,
            endpoint=asked.endpoint,
            completion_window=asked.completion_window,
            expires_at=now + asked.window_s,
            output_id="",
            errors_id="",
            metadata=asked.metadata,
            files_lifetime_s=asked.files_lifetime_s,
        )

    def earlier(
        self, caller: Caller, wanted: BatchRecord, idempotency_key: str | None, request_hash: str
    ) -> BatchRecord | None:
        """The batch that the same request made before. Raises: ApiError for a key that another request had."""
        return self._replied(caller, idempotency_key, request_hash) or self._same(wanted)

    def check_queue(self, caller: Caller, wanted: BatchRecord, forecast_s: Forecast) -> None:
        """Raises: ApiError where the key has too much in the queue, or the window cannot be met."""
        active = [batch for label in ACTIVE for batch in self._store.page(BatchRecord, owner=caller.owner, label=label)]
        file = self._library.file(caller, wanted.input_file_id)
        limit, key = self._settings.limits.max_window_batches, caller.key
        if len(active) >= limit:
            raise _too_much(f"{limit} batches of this key have not ended, which is the limit")
        if key is not None and key.max_queued_lines is not None:
            queued = sum(batch.num_lines or 0 for batch in active)
            if queued + file.num_lines > key.max_queued_lines:
                raise _too_much(f"this key may queue {key.max_queued_lines} requests, and {queued} are queued")
        if self._settings.refuses_late:
            model = self._settings.models[0].name if len(self._settings.models) == 1 else None
            end_s = forecast_s(caller, model, file.num_lines, wanted.expires_at)
            if end_s is not None and self._clock() + end_s > wanted.expires_at:
                window = wanted.completion_window
                raise _too_much(f"it would take about {end_s / 60:.0f} minutes, which is more than its window {window}")

    def _replied(self, caller: Caller, idempotency_key: str | None, request_hash: str) -> BatchRecord | None:
        if idempotency_key is None:
            return None
        reply = self._store.get(ReplyRecord, _reply_id(caller, idempotency_key))
        if reply is None or reply.expires_at <= self._clock():
            return None
        if reply.request_hash != request_hash:
            raise ApiError(
                400, "This Idempotency-Key was used for another request; use a new one.", code="idempotency_error"
            )
        return self._store.get(BatchRecord, reply.object_id)

    def _same(self, wanted: BatchRecord) -> BatchRecord | None:
        """The batch that the same request made within a minute: a client that heard no answer asks again."""
        for batch in self._store.page(BatchRecord, owner=wanted.owner, limit=100):
            if wanted.created_at - batch.created_at > SAME_REQUEST_S:
                return None
            if _asked_for(batch) == _asked_for(wanted) and batch.status not in ("failed", "cancelling", "cancelled"):
                return batch
        return None


def hash_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def reply_of(caller: Caller, idempotency_key: str, request_hash: str, batch: BatchRecord) -> ReplyRecord:
    """What a repeated request with this key is answered with."""
    now = batch.created_at
    return ReplyRecord(_reply_id(caller, idempotency_key), caller.owner, now, now + DAY_S, request_hash, batch.id)


def _asked_for(batch: BatchRecord) -> tuple[Any, ...]:
    metadata = None if batch.metadata is None else dict(batch.metadata)
    return batch.input_file_id, batch.endpoint, batch.completion_window, metadata, batch.files_lifetime_s


def _reply_id(caller: Caller, idempotency_key: str) -> str:
    return hashlib.sha256(f"{caller.owner}\n{idempotency_key}".encode()).hexdigest()


def _too_much(reason: str) -> ApiError:
    return ApiError(
        429,
        f"The batch is refused: {reason}. Try again later.",
        code="rate_limit_exceeded",
        headers={"Retry-After": "60"},
    )

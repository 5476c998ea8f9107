"""The JSON of one batch, as clients that wait ask for it again and again: made once for every state of the batch."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from blendserve.serve.records import BatchRecord
from blendserve.serve.scheduler import Scheduler

_MAX_KEPT = 10_000


class _Kept(NamedTuple):
    """A body, and of which state it is."""

    record: BatchRecord
    moving: tuple[object, ...]
    body: bytes


class PollBodies:
    """Bodies by batch."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._kept: dict[str, _Kept] = {}

    def body(self, batch: BatchRecord) -> bytes:
        """OpenAI's object of a stored batch, and beside it what only this service knows."""
        id, moving = batch.id, self._moving(batch)
        kept = self._kept.get(id)
        if kept is not None and kept.record is batch and kept.moving == moving:
            return kept.body
        counts = None if batch.is_ended else self._scheduler.counts(id)
        shown = {**batch.counted(counts).to_json(), "blendserve": outlook(self._scheduler, batch)}
        body = json.dumps(shown, ensure_ascii=False).encode()
        self._kept[id] = _Kept(batch, moving, body)
        if len(self._kept) > _MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        return body

    def _moving(self, batch: BatchRecord) -> tuple[object, ...]:
        """What changes in a body while the record stays as it is."""
        id, scheduler = batch.id, self._scheduler
        if batch.is_ended:
            return ()
        return scheduler.progress.get(id), scheduler.is_running(id), *_end_of(scheduler, batch)


def outlook(scheduler: Scheduler, batch: BatchRecord) -> dict[str, Any] | None:
    """What OpenAI's object does not say of a batch that has not ended: its rows so far, and when it will end."""
    if batch.is_ended:
        return None
    expected_end_at, is_in_danger = _end_of(scheduler, batch)
    return {
        "output_so_far": f"/v1/batches/{batch.id}/output",
        "errors_so_far": f"/v1/batches/{batch.id}/errors",
        "is_running": scheduler.is_running(batch.id),
        "expected_end_at": expected_end_at,
        "is_in_danger": is_in_danger,
    }


def _end_of(scheduler: Scheduler, batch: BatchRecord) -> tuple[int | None, bool]:
    """When the batch will end, as far as is known, and whether that is too late."""
    end = scheduler.forecast.ends().get(batch.id)
    return (None, False) if end is None else (int(end), end > batch.expires_at)

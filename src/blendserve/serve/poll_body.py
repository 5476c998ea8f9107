"""The JSON of one batch, as clients that wait ask for it again and again: made once for every state of the batch."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from blendserve.serve.records import BatchRecord
from blendserve.serve.scheduler import Scheduler

_MAX_KEPT = 10_000


class _Kept(NamedTuple):
    """The body without its last brace, and of which state it is."""

    record: BatchRecord
    counts: tuple[int, int] | None
    head: bytes


class PollBodies:
    """Bodies by batch."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._kept: dict[str, _Kept] = {}

    def body(self, batch: BatchRecord) -> bytes:
        """OpenAI's object of a stored batch, and beside it what only this service knows."""
        return self._head(batch) + b', "blendserve": ' + json.dumps(outlook(self._scheduler, batch)).encode() + b"}"

    def _head(self, batch: BatchRecord) -> bytes:
        counts = None if batch.is_ended else self._scheduler.counts(batch.id)
        kept = self._kept.get(batch.id)
        if kept is not None and kept.record is batch and kept.counts == counts:
            return kept.head
        head = json.dumps(batch.counted(counts).to_json(), ensure_ascii=False).encode()[:-1]
        self._kept[batch.id] = _Kept(batch, counts, head)
        if len(self._kept) > _MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        return head


def outlook(scheduler: Scheduler, batch: BatchRecord) -> dict[str, Any] | None:
    """What OpenAI's object does not say of a batch that has not ended: its rows so far, and when it will end."""
    if batch.is_ended:
        return None
    end = scheduler.ends().get(batch.id)
    return {
        "output_so_far": f"/v1/batches/{batch.id}/output",
        "errors_so_far": f"/v1/batches/{batch.id}/errors",
        "is_running": batch.id in scheduler.running_ids,
        "expected_end_at": None if end is None else int(end),
        "is_in_danger": end is not None and end > batch.expires_at,
    }

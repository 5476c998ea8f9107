"""Batches from their creation to their files. The scheduler runs them; the store holds every change of state.

A restarted service finds every batch in some state and goes on from there: see `recover`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from blendserve.errors import BlendServeError, CapacityError
from blendserve.serve.asked import read_asked
from blendserve.serve.blobs import Blobs
from blendserve.serve.caller import Caller
from blendserve.serve.clock import Clock
from blendserve.serve.failures import ApiError, invalid, not_found
from blendserve.serve.finalize import WrittenFile, WrittenFiles, write_files
from blendserve.serve.library import Library
from blendserve.serve.records import (
    INPUT_PURPOSE,
    OUTPUT_PURPOSE,
    BatchRecord,
    FileRecord,
    ReplyRecord,
    new_id,
)
from blendserve.serve.settings import DAY_S, ServeSettings
from blendserve.serve.states import Ending, can_cancel, resumption_of
from blendserve.serve.store import Store
from blendserve.serve.validation import Validated, validate_file

ACTIVE = ("validating", "in_progress", "cancelling", "finalizing")
SAME_REQUEST_S = 60
_RETRY_S = 10.0


class Runner(Protocol):
    """Who runs batches: told of new ones, asked for their journals back, and for when a batch would end."""

    def wake(self) -> None: ...
    async def release(self, batch_id: str) -> None: ...
    def counts(self, batch_id: str) -> tuple[int, int] | None: ...
    def forecast_s(self, caller: Caller, model: str | None, num_lines: int, deadline: float) -> float | None: ...


class Batches:
    """All batches of a service. `tell` is called with every batch that has changed its state."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        library: Library,
        settings: ServeSettings,
        clock: Clock,
        tell: Callable[[BatchRecord], None],
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._library = library
        self._settings = settings
        self._clock = clock
        self._tell = tell
        self._runner: Runner | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading = asyncio.Semaphore(1)
        self._writing = asyncio.Semaphore(1)
        self._is_closed = False

    def attach(self, runner: Runner) -> None:
        self._runner = runner

    @property
    def runner(self) -> Runner:
        assert self._runner is not None, "batches need a runner"
        return self._runner

    def directory(self, id: str) -> Path:
        """Where the journal of a batch stands."""
        return self._settings.data / "batches" / id

    # What clients ask for

    def find(self, caller: Caller, id: str) -> BatchRecord | None:
        """A batch of the caller as it is stored."""
        found = self._store.get(BatchRecord, id)
        return found if found is not None and found.owner == caller.owner else None

    def get(self, caller: Caller, id: str) -> BatchRecord:
        """Raises: ApiError where the caller has no such batch."""
        found = self.find(caller, id)
        if found is None:
            raise not_found("Batch", id)
        return self.counted(found)

    def page(self, caller: Caller, *, after: str | None, limit: int) -> list[BatchRecord]:
        """Newest first. Raises: ApiError when `after` is no batch of the caller."""
        if after is not None:
            self.get(caller, after)
        found = self._store.page(BatchRecord, owner=caller.owner, after=after, limit=limit)
        return [self.counted(batch) for batch in found]

    def counted(self, batch: BatchRecord) -> BatchRecord:
        """The batch with the rows that it has by now."""
        return batch.counted(None if batch.is_ended else self.runner.counts(batch.id))

    def create(self, caller: Caller, body: Mapping[str, Any], idempotency_key: str | None = None) -> BatchRecord:
        """Make a batch, or find the one that the same request made. Raises: ApiError."""
        wanted = self._read(caller, body)
        request_hash = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        earlier = self._replied(caller, idempotency_key, request_hash) or self._same(wanted)
        if earlier is not None:
            return earlier
        self._check_queue(caller, wanted)
        batch = self._numbered(wanted)
        records: list[BatchRecord | ReplyRecord] = [batch]
        if idempotency_key is not None:
            now = batch.created_at
            id = _reply_id(caller, idempotency_key)
            records.append(ReplyRecord(id, caller.owner, now, now + DAY_S, request_hash, batch.id))
        self._store.put(*records)
        self._tell(batch)
        self._spawn(self._validate(batch))
        return batch

    def cancel(self, caller: Caller, id: str) -> BatchRecord:
        """Begin to cancel; the end comes within seconds. Raises: ApiError for a batch that has ended."""
        batch = self.get(caller, id)
        if batch.status == "cancelling":
            return batch
        if not can_cancel(batch.status):
            raise invalid(f"Batch {id} is {batch.status}; only a batch that runs can be cancelled.", "id")
        batch = self._move(batch.moved("cancelling", self._now(), ending="cancelled"))
        self._spawn(self._let_go_and_finalize(batch.id))
        return batch

    def delete(self, caller: Caller, id: str) -> None:
        """Forget a batch that has ended, and its output and error files."""
        batch = self.get(caller, id)
        if not batch.is_ended:
            raise invalid(f"Batch {id} is {batch.status}; cancel it first.", "id")
        found = (self._store.get(FileRecord, name) for name in (batch.output_file_id, batch.error_file_id) if name)
        self._library.remove(*(record for record in found if record is not None))
        self._store.delete(batch)

    # What the scheduler tells

    def finish(self, id: str, ending: Ending, errors: tuple[Mapping[str, Any], ...] = ()) -> None:
        """Write the files of a batch whose journal is free, and end it. Nothing happens where that is under way."""
        batch = self._store.get(BatchRecord, id)
        if batch is None or batch.status not in ("validating", "in_progress"):
            return
        self._move(self.counted(batch).moved("finalizing", self._now(), ending=ending, errors=errors))
        self._spawn(self._finalize(id))

    def expire(self, id: str) -> None:
        """End a batch whose window is over; what is done is kept."""
        batch = self._store.get(BatchRecord, id)
        if batch is None or batch.status not in ("validating", "in_progress"):
            return
        self._move(self.counted(batch).moved("finalizing", self._now(), ending="expired"))
        self._spawn(self._let_go_and_finalize(id))

    def recover(self) -> None:
        """Go on with what an earlier service left, and sweep what it left lying about."""
        self.directory("x").parent.mkdir(mode=0o700, exist_ok=True)
        for status in ACTIVE:
            for batch in self._store.page(BatchRecord, label=status, is_newest_first=False):
                match resumption_of(batch.status):
                    case "validate":
                        self._spawn(self._validate(batch))
                    case "release":
                        self._spawn(self._let_go_and_finalize(batch.id))
                    case "finalize":
                        self._spawn(self._finalize(batch.id))
                    case "run":
                        self.runner.wake()
        for entry in self.directory("x").parent.iterdir():
            found = self._store.get(BatchRecord, entry.name)
            if found is None or found.is_ended:
                shutil.rmtree(entry, ignore_errors=True)

    async def close(self) -> None:
        """Stop what is under way; a later service goes on with it."""
        self._is_closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Creation

    def _read(self, caller: Caller, body: Mapping[str, Any]) -> BatchRecord:
        """A batch without a name, as the body asks for it. Raises: ApiError."""
        asked = read_asked(body)
        file = self._library.file(caller, asked.input_file_id)
        if file.purpose != INPUT_PURPOSE:
            raise invalid(f"File {file.id} has the purpose {file.purpose!r}; it must be 'batch'.", "input_file_id")
        now = self._now()
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

    def _numbered(self, batch: BatchRecord) -> BatchRecord:
        return replace(batch, id=new_id("batch"), output_id=new_id("file"), errors_id=new_id("file"))

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

    def _check_queue(self, caller: Caller, wanted: BatchRecord) -> None:
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
            end_s = self.runner.forecast_s(caller, model, file.num_lines, wanted.expires_at)
            if end_s is not None and self._clock() + end_s > wanted.expires_at:
                window = wanted.completion_window
                raise _too_much(f"it would take about {end_s / 60:.0f} minutes, which is more than its window {window}")

    # Progress

    async def _validate(self, batch: BatchRecord) -> None:
        def is_stopped() -> bool:
            return self._is_closed

        async with self._reading:
            path = self._blobs.path(batch.input_file_id)
            try:
                checking = (path, batch.endpoint, self._settings, is_stopped)
                found = await asyncio.to_thread(validate_file, *checking)
            except OSError as error:
                message = f"The input file cannot be read: {error.strerror}."
                found = Validated(0, None, ({"code": "file_error", "message": message},))
        if self._is_closed:
            return
        now_batch = self._store.get(BatchRecord, batch.id)
        if now_batch is None or now_batch.status != "validating":
            return
        if found.errors:
            self._move(now_batch.moved("failed", self._now(), errors=found.errors, ending="failed"))
        else:
            changes = {"num_lines": found.num_lines, "model": found.model}
            self._move(now_batch.moved("in_progress", self._now(), **changes))
            self.runner.wake()

    async def _let_go_and_finalize(self, id: str) -> None:
        await self.runner.release(id)
        batch = self._store.get(BatchRecord, id)
        if batch is not None and batch.status == "cancelling":
            self._move(batch.moved("finalizing", self._now()))
        await self._finalize(id)

    async def _finalize(self, id: str) -> None:
        """Write the files, as often as it takes: a full disk may have room later."""
        async with self._writing:
            while True:
                batch = self._store.get(BatchRecord, id)
                if batch is None or batch.status != "finalizing":
                    return
                try:
                    written = await asyncio.to_thread(self._write, batch)
                except CapacityError:
                    await asyncio.sleep(_RETRY_S)
                    continue
                except (BlendServeError, OSError) as error:
                    message = f"The files of the batch could not be written: {error}."
                    self._move(
                        batch.moved("failed", self._now(), errors=({"code": "server_error", "message": message},))
                    )
                    return
                self._end(batch, written)
                break
        await asyncio.to_thread(shutil.rmtree, self.directory(id), True)

    def _write(self, batch: BatchRecord) -> WrittenFiles:
        return write_files(
            self._blobs,
            self.directory(batch.id),
            self._blobs.path(batch.input_file_id),
            output_id=batch.output_id,
            errors_id=batch.errors_id,
            ending=batch.ending or "completed",
        )

    def _end(self, batch: BatchRecord, written: WrittenFiles) -> None:
        """Give the batch its files and its last state, in one transaction."""
        now = self._now()
        files = [
            self._file(batch, id, name, file, now)
            for id, name, file in (
                (batch.output_id, "output", written.output),
                (batch.errors_id, "error", written.errors),
            )
            if file is not None
        ]
        ended = batch.moved(
            batch.ending or "completed",
            now,
            output_file_id=batch.output_id if written.output else None,
            error_file_id=batch.errors_id if written.errors else None,
            num_completed=written.num_completed,
            num_failed=written.num_failed,
            num_lines=batch.num_lines or written.num_completed + written.num_failed,
            usage=written.usage,
        )
        self._store.put(*files, ended)
        self._tell(ended)

    def _file(self, batch: BatchRecord, id: str, name: str, file: WrittenFile, now: int) -> FileRecord:
        lifetime = batch.files_lifetime_s or self._settings.limits.file_lifetime_s
        return FileRecord(
            id=id,
            owner=batch.owner,
            created_at=now,
            filename=f"{batch.id}_{name}.jsonl",
            purpose=OUTPUT_PURPOSE,
            num_bytes=file.num_bytes,
            num_lines=file.num_lines,
            sha256=file.sha256,
            expires_at=now + lifetime,
            batch_id=batch.id,
        )

    def _move(self, batch: BatchRecord) -> BatchRecord:
        self._store.put(batch)
        self._tell(batch)
        return batch

    def _now(self) -> int:
        return int(self._clock())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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

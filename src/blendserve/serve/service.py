"""The service without HTTP: its parts put together, started, kept tidy and stopped."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Callable

from blendserve.errors import ConfigError
from blendserve.job.disk import open_own
from blendserve.serve.asking import Asking
from blendserve.serve.batches import Batches
from blendserve.serve.blobs import DirectoryBlobs
from blendserve.serve.clock import Clock, steady_clock
from blendserve.serve.engine_host import end_leftovers
from blendserve.serve.keys import KeyFile
from blendserve.serve.library import Library
from blendserve.serve.poll_body import PollBodies
from blendserve.serve.priority import give_way
from blendserve.serve.records import BatchRecord, ReplyRecord
from blendserve.serve.scheduler import Scheduler
from blendserve.serve.settings import ServeSettings
from blendserve.serve.store import SqliteStore
from blendserve.serve.webhooks import Webhooks

_SWEEP_S = 30.0
_OLD_ENGINE_PAUSE_S = 0.05


class Service:
    """One service on one data directory, which it locks.

    Raises: ConfigError when the directory is used by another service, cannot be written, or is damaged.
    """

    def __init__(self, settings: ServeSettings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock = clock or steady_clock()
        self._lock = _lock(settings)
        self.keys = KeyFile(settings.data)
        try:
            self.store = SqliteStore(settings.data / "service.db")
            self.blobs = DirectoryBlobs(settings.data)
        except ConfigError:
            os.close(self._lock)
            raise
        self.library = Library(self.store, self.blobs, settings.limits, self.clock)
        self.listeners: list[Callable[[BatchRecord], None]] = []
        self.watchers: set[asyncio.Event] = set()
        self.on_hopeless: Callable[[str], None] = lambda _: None
        self.started_at = int(self.clock())
        self.num_ended = 0

    async def start(self) -> None:
        """Go on with what an earlier service left, and begin to work."""
        self.batches = Batches(self.store, self.blobs, self.library, self.settings, self.clock, self._told)
        self.scheduler = Scheduler(self.store, self.blobs, self.batches, self.settings, self.clock, self.changed)
        give_way()
        self.batches.attach(self.scheduler)
        self.poll_bodies = PollBodies(self.scheduler)
        self.asking = Asking(self.scheduler)
        self.scheduler.on_report = self.asking.hear
        self.scheduler.on_hopeless = self.on_hopeless
        await asyncio.to_thread(_wait_for_old_engine, self.settings)
        self.blobs.sweep(self.library.known_blobs())
        works = [self.scheduler.run(), self._sweep()]
        if self.settings.webhook is not None:
            webhooks = Webhooks(self.store, self.settings.webhook, self.clock)
            self.listeners.append(webhooks.told)
            works.append(webhooks.run())
        self.batches.recover()
        self._tasks = [asyncio.create_task(work) for work in works]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Stop in good order. Batches that run are resumed by the next service."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.scheduler.host.close()
        await self.batches.close()
        self.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """What works in the background never ends by itself; without it batches would wait for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.on_hopeless(f"the service cannot go on: {error}; start it again")

    def close(self) -> None:
        """Give the directory free."""
        self.store.close()
        os.close(self._lock)

    def changed(self) -> None:
        """Wake everybody who watches."""
        for event in self.watchers:
            event.set()

    def _told(self, batch: BatchRecord) -> None:
        self.num_ended += batch.is_ended
        for listener in self.listeners:
            listener(batch)
        self.changed()

    async def _sweep(self) -> None:
        while True:
            now = self.clock()
            self.library.sweep()
            self.store.delete(*self.store.expired(ReplyRecord, now))
            await asyncio.sleep(_SWEEP_S)


def _lock(settings: ServeSettings) -> int:
    """Raises: ConfigError when another service has the directory."""
    data = settings.data
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open_own(data / "service.lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ConfigError(
            f"cannot write in {data}: {error.strerror}; give --data a directory that you may write to"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise ConfigError(
            f"{data} is in use by another service (process {holder}); stop it, or give --data another directory"
        ) from None
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        os.close(lock)
        raise ConfigError(
            f"cannot write in {data}: {error.strerror}; free some space, or give --data another directory"
        ) from error
    return lock


def _wait_for_old_engine(settings: ServeSettings) -> None:
    """The engine process of a killed service ends by itself; its journals are free then. What it has started may stay
    where it was killed too, and is ended here.
    """
    lock = open_own(settings.data / "engine.lock", os.O_RDWR | os.O_CREAT)
    written = os.pread(lock, 32, 0).strip()
    leader = int(written) if written.isdigit() else 0
    try:
        while True:
            end_leftovers(leader)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_OLD_ENGINE_PAUSE_S)
        os.ftruncate(lock, 0)
    except OSError:
        pass  # a file system without locks
    finally:
        os.close(lock)

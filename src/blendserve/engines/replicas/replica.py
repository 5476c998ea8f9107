"""One replica: an engine in a thread, asked by calls from outside. Ray makes a process of it; nothing here knows.

Failures are values of the replies: what is raised here is a bug of ours.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from blendserve.engines.replicas.part import JobPart, SharedJob
from blendserve.errors import BlendServeError, ExecutorError
from blendserve.job.pending import PendingRequests
from blendserve.job.store import TokenStore
from blendserve.planner.base import Int64s
from blendserve.request import SequenceOutput

MAX_BATCH = 256
"""Most outputs of one reply, and of those that wait: an engine that is ahead of the driver by more waits for it."""


class ReplicaEngine(Protocol):
    """What a replica needs of an engine. `generate` is called again for every lease; what it loaded may stay."""

    @property
    def identity(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    def generate(self, pending: PendingRequests) -> Iterator[SequenceOutput]: ...
    def close(self) -> None: ...


OpenEngine = Callable[[], ReplicaEngine]


class Hello(NamedTuple):
    """Who a replica is. `identity` and `settings` are the engine's; `error` is why it could not be opened."""

    incarnation: str
    identity: str = ""
    settings: Mapping[str, Any] | None = None
    error: BlendServeError | None = None


class Reply(NamedTuple):
    """What has come of a lease since it was last asked for; False in `is_known` where this process never had it.

    `returned`: rows of the job. `error` comes after the last output of an engine that failed.
    """

    is_known: bool
    outputs: tuple[SequenceOutput, ...]
    returned: Int64s
    is_drained: bool
    error: BlendServeError | None


class _Opened(NamedTuple):
    """What a replica works with for all of its life."""

    engine: ReplicaEngine
    job: SharedJob
    store: TokenStore


class Replica:
    """Answers the requests of one lease at a time. Called by one thread."""

    def __init__(self, open_engine: OpenEngine) -> None:
        self._incarnation = uuid.uuid4().hex
        self._open_engine = open_engine
        self._opened: _Opened | None = None
        self._lease: _Lease | None = None

    def hello(self, job: SharedJob) -> Hello:
        """Open the engine where it is not yet, and say who it is."""
        try:
            self._opened = self._opened or _Opened(self._open_engine(), job, job.store())
        except BlendServeError as error:
            return Hello(self._incarnation, error=error)
        engine = self._opened.engine
        return Hello(self._incarnation, engine.identity, dict(engine.settings))

    def begin(self, lease: int, requests: Int64s) -> None:
        """Start on rows of the job. What an earlier lease has left is dropped."""
        assert self._opened is not None, "begin before hello"
        engine, job, store = self._opened
        self._drop_lease()
        self._lease = _Lease(lease, engine, JobPart(job, store, requests))

    def take(self, lease: int, share: float, wait_s: float) -> Reply:
        """What has ended, after waiting up to `wait_s` for something; `share` of what is unstarted is given back."""
        if self._lease is None or self._lease.number != lease:
            return Reply(False, (), np.zeros(0, np.int64), False, None)
        return self._lease.take(share, wait_s)

    def drop(self, lease: int, requests: Int64s) -> None:
        """Do not begin rows of the job that nobody wants any more."""
        if self._lease is not None and self._lease.number == lease:
            self._lease.drop(requests)

    def close(self) -> None:
        """Stop working and close the engine."""
        self._drop_lease()
        if self._opened is not None:
            self._opened.engine.close()
            self._opened = None

    def _drop_lease(self) -> None:
        if self._lease is not None:
            self._lease.abandon()
            self._lease = None


class _Lease:
    """One run of the engine, in a thread, and the queue that leads out of it. None ends the queue."""

    def __init__(self, number: int, engine: ReplicaEngine, part: JobPart) -> None:
        self.number = number
        self._part = part
        self._engine = engine
        self._outbox: queue.Queue[SequenceOutput | None] = queue.Queue(MAX_BATCH)
        self._is_drained = False
        self._is_abandoned = False
        self._error: BlendServeError | None = None
        self._thread = threading.Thread(target=self._work, name=f"lease-{number}", daemon=True)
        self._thread.start()

    def take(self, share: float, wait_s: float) -> Reply:
        returned = self._part.give_back(share) if share else np.zeros(0, np.int64)
        outputs = tuple(self._ended(0.0 if share else wait_s))
        is_over = self._is_drained
        return Reply(True, outputs, returned, is_over and self._error is None, self._error if is_over else None)

    def drop(self, requests: Int64s) -> None:
        self._part.drop(requests)

    def abandon(self) -> None:
        """Let the engine stop at its next output, and wait until it has."""
        self._is_abandoned = True
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._outbox.get(timeout=0.05)
        self._thread.join()

    def _ended(self, wait_s: float) -> Iterator[SequenceOutput]:
        deadline_s = time.monotonic() + wait_s
        for count in range(MAX_BATCH):
            left_s = deadline_s - time.monotonic()
            try:
                output = self._outbox.get(timeout=left_s) if left_s > 0 and not count else self._outbox.get_nowait()
            except queue.Empty:
                return
            if output is None:
                self._is_drained = True
                return
            yield output

    # The engine's thread

    def _work(self) -> None:
        try:
            self._generate()
        except BlendServeError as error:
            self._error = error
        except BaseException as error:  # noqa: BLE001  (told to the driver, which starts this process anew)
            traceback.print_exc()
            self._error = ExecutorError(f"{type(error).__name__}: {error}")
        self._outbox.put(None)

    def _generate(self) -> None:
        outputs = self._engine.generate(self._part)
        try:
            for output in outputs:
                if self._is_abandoned:
                    return
                if not self._part.is_given_back(output.index):
                    self._outbox.put(replace(output, index=int(self._part.requests[output.index])))
        finally:
            if close := getattr(outputs, "close", None):
                close()

"""Replicas without Ray, and engines for them that need no model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from batch_fakes import SERVED, FakeCodec, answer

from blendserve.costs.model_cost import CostModel
from blendserve.engines.replicas.cluster import ReplicaShape
from blendserve.engines.replicas.events import Batch, Command, Ready
from blendserve.engines.replicas.ledger import Ledger
from blendserve.errors import BlendServeError, ExecutorError, RequestError
from blendserve.job.ingest import encode_lines
from blendserve.job.pending import PendingRequests, plan_pending
from blendserve.job.reader import BatchReader
from blendserve.job.store import TokenStore
from blendserve.job.store_writer import StoreWriter
from blendserve.planner.plan import Plan
from blendserve.request import Request, SequenceOutput

COST = CostModel(token_s=1.0, kv_token_s=0.1)


def answer_of(index: int) -> SequenceOutput:
    return SequenceOutput(index, np.zeros(1, np.int32), "length", 1, 0)


def batch(
    replica: int, lease: int, ended: Sequence[int], returned: Sequence[int] = (), *, is_drained: bool = False
) -> Batch:
    """What a replica tells, in terms of rows."""
    return Batch(replica, lease, [answer_of(row) for row in ended], np.array(returned, np.int64), is_drained)


def ledger_of(sizes: Sequence[int], *, ready: bool) -> Ledger:
    """A ledger whose parts are runs of rows, in the order of the plan."""
    ends = np.cumsum(sizes)
    parts = [np.arange(end - size, end, dtype=np.int64) for size, end in zip(sizes, ends, strict=True)]
    ledger = Ledger(parts, np.arange(int(ends[-1]), dtype=np.int64))
    for replica in range(len(sizes) if ready else 0):
        ledger.apply(Ready(replica))
    return ledger


def run_commands(ledger: Ledger, note: Callable[[Command], None] = lambda _: None) -> list[Command]:
    """Do all that the ledger decides. Returns: the commands."""
    done = []
    while (command := ledger.decide()) is not None:
        note(command)
        ledger.apply(command)
        done.append(command)
    return done


def pending_of(directory: Path, source: Path) -> PendingRequests:
    """All valid requests of a batch file of the fake model."""
    writer = StoreWriter(directory)
    encode_lines(BatchReader(source, SERVED), FakeCodec(), SERVED.max_model_len, writer.add, lambda _: None)
    store = TokenStore.open(directory, writer.finish(), SERVED.max_model_len)
    return PendingRequests(store, np.arange(store.num_requests))


def plan_of_pending(pending: PendingRequests) -> Plan:
    return plan_pending(pending, pending.table(), COST)


@dataclass
class FakeReplicaEngine:
    """Answers as `batch_fakes.answer` does, in the order of rows, `ahead` of them being looked up at a time. `fail` may
    raise before each answer, or end the process; it is told how many answers this process has given. `fail_to_open` may
    raise before there is an engine.
    """

    answer_s: float = 0.0
    ahead: int = 4
    fail: Callable[[int], None] = lambda _: None
    fail_to_open: Callable[[int], None] = lambda _: None
    identity: str = "tiny@1"
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_answers: int = 0
    is_closed: bool = False

    def generate(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        running: list[tuple[int, Request | RequestError]] = []
        waiting = iter(range(len(pending)))
        while True:
            while len(running) < self.ahead and (row := next(waiting, None)) is not None:
                running.append((row, _looked_up(pending, row)))
            if not running:
                return
            row, request = running.pop(0)
            if isinstance(request, RequestError):
                yield SequenceOutput(row, np.zeros(0, np.int32), "error", 0, 0, error=request)
                continue
            time.sleep(self.answer_s)
            self.fail(self.num_answers)
            self.num_answers += 1
            yield answer(request)

    def close(self) -> None:
        self.is_closed = True


def _looked_up(pending: PendingRequests, row: int) -> Request | RequestError:
    try:
        return pending[row]
    except RequestError as error:
        return error


def open_fake(engine: FakeReplicaEngine, shape: ReplicaShape) -> FakeReplicaEngine:  # noqa: ARG001
    """Opens an engine where a pool wants one."""
    engine.fail_to_open(0)
    return engine


@dataclass(frozen=True)
class FailOnce:
    """Makes one process of all that share `marker` fail after `at` answers: by its engine, or killed from outside."""

    marker: Path
    at: int
    is_kill: bool

    def __call__(self, num_answers: int) -> None:
        if num_answers != self.at:
            return
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return
        if self.is_kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ExecutorError("the device is gone")


@dataclass(frozen=True)
class FailAlways:
    """Makes every engine fail before it answers."""

    error: BlendServeError

    def __call__(self, num_answers: int) -> None:  # noqa: ARG002
        raise self.error

"""Where every request of a job is: unsent, in flight on one replica, or journalled. `apply` alone changes that.

The driver asks `decide` what to do next, does it, applies it, and applies what comes back. An answer counts once: when
its request is in flight on the replica, and under the lease, that it comes from. Source: paper section 5.5 for the
parts; leases, losses and stealing are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from blendserve.engines.replicas.events import Batch, Begin, Command, Drop, Event, Lost, Poll, Ready
from blendserve.errors import ExecutorError
from blendserve.planner.base import Int64s
from blendserve.request import SequenceOutput

UNSENT, JOURNALLED = -1, -2  # in place of the replica that a request is in flight on
NOBODY = -1  # in place of the replica whose part an unsent request is of

MIN_PIECE = 32
"""Requests that a replica takes at least from what others have not begun: fewer would not fill its batch."""


class Phase(Enum):
    """A replica's process is starting or restarting, waits for work, works, or never comes back."""

    ABSENT = "absent"
    IDLE = "idle"
    BUSY = "busy"
    GONE = "gone"


@dataclass(slots=True)
class ReplicaState:
    """`lease` is the number of the latest; `has_spare`: it may hold requests of it that it has not started. `to_drop`:
    what it was sent and nobody wants any more.
    """

    phase: Phase = Phase.ABSENT
    lease: int = 0
    num_in_flight: int = 0
    is_polled: bool = False
    share_asked: float = 0.0
    has_spare: bool = False
    reason: str = ""
    to_drop: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))


class Ledger:
    """The requests of a job, divided among replicas.

    Shapes: `parts` one int64 array of rows per replica, together every row once; `rank` int64[num_requests], the place
    of every row in the plan, by which pieces keep together what shares prefixes.
    """

    def __init__(self, parts: Sequence[Int64s], rank: Int64s) -> None:
        self.replicas = [ReplicaState() for _ in parts]
        self.num_journalled = 0
        self.num_stolen = 0
        self.num_losses = 0
        self.begins_no_more = False
        self._rank = rank
        self._place = np.full(len(rank), UNSENT, np.int64)
        self._home = np.full(len(rank), NOBODY, np.int64)
        for replica, part in enumerate(parts):
            self._home[part] = replica

    @property
    def is_done(self) -> bool:
        return self.num_journalled == len(self._place)

    @property
    def is_hopeless(self) -> bool:
        """Is something left and nobody there to do it?"""
        return not self.is_done and all(state.phase is Phase.GONE for state in self.replicas)

    def num_in(self, phase: Phase) -> int:
        return sum(state.phase is phase for state in self.replicas)

    def withdraw(self, requests: Int64s) -> None:
        """Nobody wants these rows any more: they count as journalled, and what comes of them counts no more."""
        rows = requests[self._place[requests] != JOURNALLED]
        for replica, state in enumerate(self.replicas):
            there = rows[self._place[rows] == replica]
            state.num_in_flight -= len(there)
            state.to_drop = np.concatenate((state.to_drop, there))
        self._place[rows] = JOURNALLED
        self.num_journalled += len(rows)

    def end_early(self) -> None:
        """Have nothing more begun: what replicas have not started is withdrawn as they give it back."""
        self.begins_no_more = True
        self.withdraw(np.flatnonzero(self._place == UNSENT))

    # Decide

    def decide(self) -> Command | None:
        """What to do next, None where one can only wait. Mutates nothing: apply the command once it is done."""
        for replica, state in enumerate(self.replicas):
            if len(state.to_drop):
                return Drop(replica, state.lease, state.to_drop)
            if state.phase is Phase.IDLE and len(piece := self._piece_for(replica)):
                return Begin(replica, state.lease + 1, np.sort(piece))
        for replica, state in enumerate(self.replicas):
            if state.phase is Phase.BUSY and not state.is_polled:
                return Poll(replica, state.lease, self._share_wanted(replica))
        return None

    def _piece_for(self, replica: int) -> Int64s:
        """Its own part; else of what is nobody's, an even part for each idle replica; else of what an absent replica
        is to begin, half."""
        if len(own := self._unsent(replica)):
            return own
        if len(free := self._unsent(NOBODY)):
            num_idle = self.num_in(Phase.IDLE)
            return free[: max(-(-len(free) // num_idle), MIN_PIECE)]
        absent = [other for other, state in enumerate(self.replicas) if state.phase is Phase.ABSENT]
        waiting = max((self._unsent(other) for other in absent), key=len, default=free)
        return middle(waiting, max(-(-len(waiting) // 2), MIN_PIECE))

    def _share_wanted(self, replica: int) -> float:
        """How much of what it has not started a busy replica should give back, so that nobody is idle."""
        if self.begins_no_more:
            return 1.0 if self.replicas[replica].has_spare else 0.0
        num_idle = self.num_in(Phase.IDLE)
        donors = [other for other, state in enumerate(self.replicas) if state.phase is Phase.BUSY and state.has_spare]
        num_asked = sum(self.replicas[other].share_asked > 0 for other in donors)
        fullest = sorted(donors, key=lambda other: -self.replicas[other].num_in_flight)[:num_idle]
        if num_asked >= num_idle or replica not in fullest:
            return 0.0
        return num_idle / (num_idle + len(donors)) if num_idle > len(donors) else 0.5

    def _unsent(self, home: int) -> Int64s:
        """Unsent rows of a part, in the order of the plan."""
        rows = np.flatnonzero((self._place == UNSENT) & (self._home == home))
        return rows[np.argsort(self._rank[rows], kind="stable")]

    # Apply

    def apply(self, happened: Command | Event) -> Sequence[SequenceOutput]:
        """Take note of what was done or has come. Returns: the answers that count, to be journalled now.

        Raises: ExecutorError when an engine has ended without answering all it was given.
        """
        match happened:
            case Begin():
                self._begin(happened)
            case Poll():
                state = self.replicas[happened.replica]
                state.is_polled, state.share_asked = True, happened.share
            case Drop():
                self.replicas[happened.replica].to_drop = np.zeros(0, np.int64)
            case Ready():
                if self.replicas[happened.replica].phase is Phase.ABSENT:
                    self.replicas[happened.replica].phase = Phase.IDLE
            case Batch():
                return self._receive(happened)
            case Lost():
                self._lose(happened)
        return ()

    def _begin(self, begin: Begin) -> None:
        state = self.replicas[begin.replica]
        homes = self._home[begin.requests]
        self.num_stolen += int(np.count_nonzero(homes != begin.replica))
        self._place[begin.requests] = begin.replica
        self._home[begin.requests] = begin.replica
        state.phase, state.lease, state.has_spare = Phase.BUSY, begin.lease, True
        state.num_in_flight = len(begin.requests)
        state.is_polled, state.share_asked = False, 0.0

    def _receive(self, batch: Batch) -> list[SequenceOutput]:
        state = self.replicas[batch.replica]
        if state.phase is not Phase.BUSY or batch.lease != state.lease:
            return []
        accepted = []
        for output in batch.outputs:
            if self._place[output.index] == batch.replica:
                self._place[output.index] = JOURNALLED
                accepted.append(output)
        returned = batch.returned[self._place[batch.returned] == batch.replica]
        self._place[returned] = UNSENT
        self._home[returned] = NOBODY
        self.num_journalled += len(accepted)
        state.num_in_flight -= len(accepted) + len(returned)
        if self.begins_no_more:
            self.withdraw(returned)
        if state.share_asked and not len(returned):
            state.has_spare = False
        state.is_polled, state.share_asked = False, 0.0
        if batch.is_drained:
            if state.num_in_flight:
                raise ExecutorError(
                    f"the engine of replica {batch.replica} ended with {state.num_in_flight} requests unanswered; "
                    "finished ones are kept: run the same command again"
                )
            state.phase = Phase.IDLE
        return accepted

    def _lose(self, lost: Lost) -> None:
        state = self.replicas[lost.replica]
        if state.phase is Phase.GONE:
            return
        self.num_losses += state.phase is not Phase.ABSENT
        self._place[self._place == lost.replica] = UNSENT
        if lost.is_final:
            self._home[(self._place == UNSENT) & (self._home == lost.replica)] = NOBODY
        state.phase = Phase.GONE if lost.is_final else Phase.ABSENT
        state.num_in_flight, state.is_polled, state.share_asked, state.reason = 0, False, 0.0, lost.reason
        state.to_drop = np.zeros(0, np.int64)
        if self.begins_no_more:
            self.end_early()

    def check(self) -> None:
        """Assert the invariants. For tests: slow."""
        assert self.num_journalled == np.count_nonzero(self._place == JOURNALLED)
        for replica, state in enumerate(self.replicas):
            assert state.num_in_flight == np.count_nonzero(self._place == replica)
            assert state.phase is Phase.BUSY or not (state.num_in_flight or state.is_polled)
            assert state.phase is not Phase.GONE or not len(self._unsent(replica)), "work waits for one who is gone"


def middle(rows: Int64s, count: int) -> Int64s:
    """`count` rows around the middle: policies that serve both ends of an order come there last."""
    begin = max(0, (len(rows) - count) // 2)
    return rows[begin : begin + count]

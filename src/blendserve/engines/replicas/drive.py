"""The driver's loop: decide, execute, apply, until every request is journalled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from blendserve.engines.replicas.events import Batch, Command, Event, Poll
from blendserve.engines.replicas.ledger import Ledger, Phase
from blendserve.errors import BlendServeError, ExecutorError
from blendserve.job.pending import PendingRequests
from blendserve.request import SequenceOutput


class Fleet(Protocol):
    """The processes of the replicas. `wait` blocks until one of them has something to say, or for a moment; `collect`,
    for a moment, until all that are polled have answered: nothing else of theirs is heard any more.

    Every replica is `Ready` once before anything else is heard of it, and answers each `Poll` with a `Batch` or `Lost`.
    """

    def execute(self, command: Command) -> None: ...
    def wait(self) -> Sequence[Event]: ...
    def collect(self) -> Sequence[Batch]: ...


def drive(ledger: Ledger, fleet: Fleet, pending: PendingRequests) -> Iterator[SequenceOutput]:
    """Yield every answer once, as it comes; rows of `pending` that are dropped meanwhile have none. A replica is asked
    for more only when what it sent has been consumed. What replicas have at hand when an interrupt or an error ends the
    run is yielded before that is raised.

    Raises: ExecutorError when no replica is left; what the fleet raises.
    """
    came: deque[SequenceOutput] = deque()
    try:
        while not _is_done(ledger, pending):
            _command(ledger, fleet)
            for event in fleet.wait():
                came.extend(ledger.apply(event))
            while came:
                yield came.popleft()
    except (KeyboardInterrupt, BlendServeError):
        yield from came  # these are paid for
        yield from _last_answers(ledger, fleet)
        raise


def _is_done(ledger: Ledger, pending: PendingRequests) -> bool:
    """Is no answer left to wait for, now that nobody wants some of them?"""
    if len(dropped := pending.dropped()):
        ledger.withdraw(dropped)
    if pending.begins_no_more and not ledger.begins_no_more:
        ledger.end_early()
    return ledger.is_done


def _command(ledger: Ledger, fleet: Fleet) -> None:
    """Have the fleet do all that there is to do. Raises: ExecutorError when nobody is left to do it."""
    while (command := ledger.decide()) is not None:
        fleet.execute(command)
        ledger.apply(command)
    if ledger.is_hopeless:
        reasons = sorted({state.reason for state in ledger.replicas if state.reason})
        raise ExecutorError(
            f"all {len(ledger.replicas)} replicas are lost ({'; '.join(reasons)}); finished requests are kept: run "
            "the same command again"
        )


def _last_answers(ledger: Ledger, fleet: Fleet) -> Iterator[SequenceOutput]:
    """Ask every busy replica once more, and nobody to begin anything."""
    for replica, state in enumerate(ledger.replicas):
        if state.phase is Phase.BUSY and not state.is_polled:
            poll = Poll(replica, state.lease, 0.0)
            fleet.execute(poll)
            ledger.apply(poll)
    for batch in fleet.collect():
        yield from ledger.apply(batch)

"""The driver's loop: decide, execute, apply, until every request is journalled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from blendserve.errors import ExecutorError
from blendserve.parallel.events import Command, Event
from blendserve.parallel.ledger import Ledger
from blendserve.request import SequenceOutput


class Fleet(Protocol):
    """The processes of the replicas. `wait` blocks until one of them has something to say, or for a moment.

    Every replica is `Ready` once before anything else is heard of it, and answers each `Poll` with a `Batch` or `Lost`.
    """

    def execute(self, command: Command) -> None: ...
    def wait(self) -> Sequence[Event]: ...


def drive(ledger: Ledger, fleet: Fleet) -> Iterator[SequenceOutput]:
    """Yield every answer once, as it comes. A replica is asked for more only when what it sent has been consumed.

    Raises: ExecutorError when no replica is left.
    """
    while not ledger.is_done:
        while (command := ledger.decide()) is not None:
            fleet.execute(command)
            ledger.apply(command)
        if ledger.is_hopeless:
            reasons = sorted({state.reason for state in ledger.replicas if state.reason})
            raise ExecutorError(
                f"all {len(ledger.replicas)} replicas are lost ({'; '.join(reasons)}); finished requests are kept: run "
                "the same command again"
            )
        for event in fleet.wait():
            yield from ledger.apply(event)

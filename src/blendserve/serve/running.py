"""The round that runs now, as the scheduler remembers it."""

from __future__ import annotations

from dataclasses import dataclass, field

from blendserve.serve.messages import RunRound


@dataclass(slots=True)
class RunningRound:
    """What was sent to the engine process, and what has come of it. `num_done_before` counts requests by batch."""

    round: RunRound
    started_at: float
    owners: frozenset[str]
    num_done_before: dict[str, int]
    is_yielding: bool = False
    is_drawn: bool = False
    progressed: set[str] = field(default_factory=set)

    @property
    def batch_ids(self) -> list[str]:
        return [share.batch.id for share in self.round.shares]

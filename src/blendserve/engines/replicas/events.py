"""What can happen to the requests of a job on replicas, as values: what the driver does, and what it learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from blendserve.planner.base import Int64s
from blendserve.request import SequenceOutput


class Begin(NamedTuple):
    """Replica `replica` starts on `requests` (ascending rows of the job) under a lease of its own number."""

    replica: int
    lease: int
    requests: Int64s


class Poll(NamedTuple):
    """A replica is asked for what has ended, and to give back `share` of what it has not started."""

    replica: int
    lease: int
    share: float


class Drop(NamedTuple):
    """A replica is told not to begin rows that nobody wants any more. It need not answer."""

    replica: int
    lease: int
    requests: Int64s


Command = Begin | Poll | Drop


class Ready(NamedTuple):
    """A replica's process is up, for the first time or again; it has nothing to do."""

    replica: int


class Batch(NamedTuple):
    """The answer to a `Poll`. `returned`: rows given back unstarted. `is_drained`: nothing comes after it."""

    replica: int
    lease: int
    outputs: Sequence[SequenceOutput]
    returned: Int64s
    is_drained: bool


class Lost(NamedTuple):
    """What a replica had in flight is gone. It comes back as `Ready`, unless `is_final`."""

    replica: int
    is_final: bool
    reason: str


Event = Ready | Batch | Lost

"""The life of a batch as a pure state machine: which state may follow which, and what a restart makes of each.

    validating -> in_progress -> finalizing -> completed
         |             |             |
         |             |             +-> expired, cancelled, failed
         |             +-> cancelling -> finalizing
         +-> failed, cancelling

`finalizing` writes the files; what the batch becomes then was decided before (`BatchRecord.ending`).
"""

from __future__ import annotations

from typing import Literal, get_args

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
Ending = Literal["completed", "failed", "expired", "cancelled"]
ENDINGS: tuple[Ending, ...] = get_args(Ending)

_NEXT: dict[Status, frozenset[Status]] = {
    "validating": frozenset(("in_progress", "failed", "cancelling", "finalizing")),
    "in_progress": frozenset(("finalizing", "cancelling")),
    "cancelling": frozenset(("finalizing",)),
    "finalizing": frozenset(ENDINGS),
    "completed": frozenset(),
    "failed": frozenset(),
    "expired": frozenset(),
    "cancelled": frozenset(),
}


def may_follow(before: Status, after: Status) -> bool:
    """May a batch go from one state to the other?"""
    return after in _NEXT[before]


def is_ended(status: Status) -> bool:
    """Has a batch reached a state that it never leaves?"""
    return not _NEXT[status]


def can_cancel(status: Status) -> bool:
    """Does cancelling still change anything?"""
    return status in ("validating", "in_progress")


Resumption = Literal["validate", "run", "release", "finalize", "nothing"]


def resumption_of(status: Status) -> Resumption:
    """What a service that starts does about a batch that an earlier one left in this state."""
    by_status: dict[Status, Resumption] = {
        "validating": "validate",
        "in_progress": "run",
        "cancelling": "release",
        "finalizing": "finalize",
    }
    return by_status.get(status, "nothing")

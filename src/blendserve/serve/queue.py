"""Which batches run next: a pure decision over values. It touches no file, clock or process.

All waiting batches of a model are planned together. Less is taken where a deadline or another key needs it:
earliest deadline first where planning all together would be late, and equal shares where several keys wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SWAP_S = 30.0
"""What loading another model is counted with."""
FIRST_ROUND_REQUESTS = 512
"""Requests of a round while the rate of a model is not known and several keys wait."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A batch with requests left. `deadline` and `created_at` are Unix times."""

    id: str
    owner: str
    model: str
    num_left: int
    deadline: float
    created_at: float


@dataclass(frozen=True, slots=True)
class Round:
    """What runs next: for every batch, how many of its requests; None stands for all that are left."""

    model: str
    max_requests: Mapping[str, int | None]


def choose_round(
    waiting: Sequence[Waiting],
    *,
    loaded: str | None,
    rates: Mapping[str, float],
    now: float,
    round_s: float,
) -> Round | None:
    """Choose a model and shares of its batches; None where nothing waits. `rates`: requests per second by model."""
    if not waiting:
        return None
    model = _model_of(waiting, loaded, rates, now)
    of_model = sorted((batch for batch in waiting if batch.model == model), key=_urgency)
    rate = rates.get(model)
    together = _that_can_wait_for_each_other(of_model, rate, now)
    return Round(model, _shares(together, rate, round_s))


def finish_times(waiting: Sequence[Waiting], rates: Mapping[str, float], now: float) -> dict[str, float]:
    """When each batch would end if they ran by deadline, one after the other. Models whose rate is not known are left
    out."""
    ends: dict[str, float] = {}
    at, before = now, None
    for batch in sorted(waiting, key=_urgency):
        rate = rates.get(batch.model)
        if not rate:
            continue
        at += batch.num_left / rate + (SWAP_S if before not in (None, batch.model) else 0.0)
        before, ends[batch.id] = batch.model, at
    return ends


def _urgency(batch: Waiting) -> tuple[float, float, str]:
    return batch.deadline, batch.created_at, batch.id


def _model_of(waiting: Sequence[Waiting], loaded: str | None, rates: Mapping[str, float], now: float) -> str:
    """The loaded model while it has work, unless a batch of another one would then be late, and is not if it goes
    first."""
    first = min(waiting, key=_urgency)
    if not any(batch.model == loaded for batch in waiting):
        return first.model
    assert loaded is not None
    loaded_s = sum(_seconds(batch, rates) for batch in waiting if batch.model == loaded)
    for batch in sorted(waiting, key=_urgency):
        if batch.model == loaded:
            continue
        own_s = SWAP_S + _seconds(batch, rates)
        if batch.deadline < now + loaded_s + own_s and now + own_s <= batch.deadline:
            return batch.model
    return loaded


def _seconds(batch: Waiting, rates: Mapping[str, float]) -> float:
    rate = rates.get(batch.model)
    return batch.num_left / rate if rate else 0.0


def _that_can_wait_for_each_other(batches: list[Waiting], rate: float | None, now: float) -> list[Waiting]:
    """The most batches, by deadline, that may all end together without one being late; at least the first."""
    if not rate:
        return batches
    kept = list(batches)
    while len(kept) > 1:
        end = now + sum(batch.num_left for batch in kept) / rate
        if not any(batch.deadline < end for batch in kept[:-1]):
            break
        kept.pop()
    return kept


def _shares(batches: Sequence[Waiting], rate: float | None, round_s: float) -> dict[str, int | None]:
    """All of every batch for one key, or where it is no more than a round; else equal shares of a round by key."""
    owners = sorted({batch.owner for batch in batches})
    room = max(len(batches), int(rate * round_s) if rate else FIRST_ROUND_REQUESTS)
    if len(owners) == 1 or sum(batch.num_left for batch in batches) <= room:
        return {batch.id: None for batch in batches}
    left = {owner: sum(batch.num_left for batch in batches if batch.owner == owner) for owner in owners}
    granted = _even(left, room)
    shares: dict[str, int | None] = {}
    for batch in batches:
        taken = min(batch.num_left, granted[batch.owner])
        granted[batch.owner] -= taken
        if taken:
            shares[batch.id] = taken
    return shares


def _even(left: Mapping[str, int], room: int) -> dict[str, int]:
    """Divide `room` evenly; what one does not need goes to the others."""
    granted: dict[str, int] = {}
    for position, owner in enumerate(sorted(left, key=lambda name: (left[name], name))):
        granted[owner] = min(left[owner], max(1, room // (len(left) - position)))
        room = max(0, room - granted[owner])
    return granted

"""The driver's loop on replicas of this process that die, come back or do not, at random: each request ends once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from batch_fakes import answer
from parallel_cases import FakeReplicaEngine, plan_of_pending

from blendserve.engines.replicas.drive import drive
from blendserve.engines.replicas.events import Batch, Begin, Command, Drop, Event, Lost, Poll, Ready
from blendserve.engines.replicas.ledger import Ledger
from blendserve.engines.replicas.part import SharedJob
from blendserve.engines.replicas.replica import Replica
from blendserve.errors import ExecutorError
from blendserve.job.pending import PendingRequests
from blendserve.planner.base import Int64s
from blendserve.planner.partition import partition
from blendserve.request import SequenceOutput


class LocalFleet:
    """Replicas without processes. Before every answer to a poll one may die, with what it was about to tell."""

    def __init__(
        self, job: SharedJob, num_replicas: int, moments: random.Random, death_rate: float, max_restarts: int
    ) -> None:
        self.num_deaths = 0
        self.largest_share = 0.0
        self._job = job
        self._moments = moments
        self._death_rate = death_rate
        self._restarts_left = [max_restarts] * num_replicas
        self._replicas: list[Replica | None] = [None] * num_replicas
        self._polls: dict[int, Poll] = {}
        self._absent = set(range(num_replicas))

    def execute(self, command: Command) -> None:
        replica = self._replicas[command.replica]
        assert replica is not None
        match command:
            case Begin():
                replica.begin(command.lease, command.requests)
            case Drop():
                replica.drop(command.lease, command.requests)
            case Poll():
                self._polls[command.replica] = command
                self.largest_share = max(self.largest_share, command.share)

    def wait(self) -> Sequence[Event]:
        if self._absent and (not self._polls or self._moments.random() < 0.3):
            index = self._moments.choice(sorted(self._absent))
            self._absent.remove(index)
            self._replicas[index] = Replica(FakeReplicaEngine)
            self._replicas[index].hello(self._job)  # type: ignore[union-attr]
            return [Ready(index)]
        if not self._polls:
            return []
        index = self._moments.choice(sorted(self._polls))
        poll, replica = self._polls.pop(index), self._replicas[index]
        assert replica is not None
        if self._moments.random() < self._death_rate:
            replica.close()
            return self._die(index)
        reply = replica.take(poll.lease, poll.share, 0.01)
        return [Batch(index, poll.lease, reply.outputs, reply.returned, reply.is_drained)]

    def collect(self) -> Sequence[Batch]:
        return ()

    def _die(self, index: int) -> list[Event]:
        self.num_deaths += 1
        self._replicas[index] = None
        lost: list[Event] = [Lost(index, False, "killed")]
        if not self._restarts_left[index]:
            return [*lost, Lost(index, True, "killed")]
        self._restarts_left[index] -= 1
        self._absent.add(index)
        return lost

    def close(self) -> None:
        for replica in self._replicas:
            if replica is not None:
                replica.close()


def run(
    pending: PendingRequests, num_replicas: int, seed: int, death_rate: float, max_restarts: int
) -> tuple[list[SequenceOutput], LocalFleet, Ledger]:
    plan = plan_of_pending(pending)
    job = SharedJob.of(pending, plan)
    ledger = Ledger(partition(plan, num_replicas).parts, job.rank)
    fleet = LocalFleet(job, num_replicas, random.Random(seed), death_rate, max_restarts)
    try:
        return list(drive(ledger, fleet, pending)), fleet, ledger
    finally:
        fleet.close()


def assert_each_answered_once(pending: PendingRequests, outputs: list[SequenceOutput]) -> None:
    assert sorted(output.index for output in outputs) == list(range(len(pending)))
    for output in outputs:
        assert output.token_ids.tolist() == answer(pending[output.index]).token_ids.tolist()


@pytest.mark.parametrize("num_replicas", [1, 2, 5])
def test_replicas_in_peace(pending: PendingRequests, num_replicas: int) -> None:
    outputs, _, ledger = run(pending, num_replicas, 0, 0.0, 0)
    assert_each_answered_once(pending, outputs)
    assert ledger.num_losses == 0
    ledger.check()


@pytest.mark.parametrize("seed", range(12))
def test_replicas_that_die_at_random(pending: PendingRequests, seed: int) -> None:
    outputs, fleet, ledger = run(pending, 3, seed, 0.3, 1000)
    assert_each_answered_once(pending, outputs)
    assert ledger.num_losses == fleet.num_deaths
    ledger.check()


def test_when_nobody_is_left_the_run_ends_with_the_reason(pending: PendingRequests) -> None:
    with pytest.raises(ExecutorError, match=r"all 2 replicas are lost \(killed\).*same command again"):
        run(pending, 2, 1, 1.0, 2)


def test_no_requests_need_no_replica(pending: PendingRequests) -> None:
    nothing = PendingRequests(pending.store, pending.numbers[:0])
    assert run(nothing, 2, 0, 1.0, 0)[0] == []


def test_work_is_stolen_at_the_end(pending: PendingRequests) -> None:
    stolen = [run(pending, 3, seed, 0.0, 0)[1:] for seed in range(6)]
    assert any(fleet.largest_share > 0 for fleet, _ in stolen)
    assert any(ledger.num_stolen > 0 for _, ledger in stolen)


class Unwanted(PendingRequests):
    """Requests of which some are dropped, and that may begin no more, once so many have ended."""

    def __init__(self, pending: PendingRequests, drops_at: int, dropped: list[int], ends_at: int) -> None:
        super().__init__(pending.store, pending.numbers)
        self.num_ended = 0
        self._drops_at, self._dropped, self._ends_at = drops_at, dropped, ends_at

    @property
    def begins_no_more(self) -> bool:
        return self.num_ended >= self._ends_at

    def dropped(self) -> Int64s:
        if self.num_ended < self._drops_at:
            return super().dropped()
        told, self._dropped = self._dropped, []
        return np.array(told, np.int64)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_dropped_has_no_answer_and_takes_nothing_along(pending: PendingRequests, seed: int) -> None:
    dropped = list(range(3, len(pending), 3))
    unwanted = Unwanted(pending, 5, dropped, len(pending) + 1)
    plan = plan_of_pending(unwanted)
    job = SharedJob.of(unwanted, plan)
    ledger = Ledger(partition(plan, 3).parts, job.rank)
    fleet = LocalFleet(job, 3, random.Random(seed), 0.1, 1000)
    found = []
    try:
        for output in drive(ledger, fleet, unwanted):
            unwanted.num_ended += 1
            found.append(output.index)
    finally:
        fleet.close()
    assert len(set(found)) == len(found)
    assert set(range(len(pending))) - set(dropped) <= set(found)
    ledger.check()


@pytest.mark.parametrize("seed", range(8))
def test_a_run_that_begins_no_more_ends(pending: PendingRequests, seed: int) -> None:
    unwanted = Unwanted(pending, 0, [], 2)
    plan = plan_of_pending(unwanted)
    job = SharedJob.of(unwanted, plan)
    ledger = Ledger(partition(plan, 2).parts, job.rank)
    fleet = LocalFleet(job, 2, random.Random(seed), 0.1, 1000)
    try:
        for _ in drive(ledger, fleet, unwanted):
            unwanted.num_ended += 1
    finally:
        fleet.close()
    assert ledger.is_done
    ledger.check()

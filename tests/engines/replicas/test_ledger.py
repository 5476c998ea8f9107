"""The ledger against a dumb twin: whatever replicas do, every request is journalled once, and none is forgotten."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from parallel_cases import answer_of, batch, ledger_of, run_commands

from blendserve.engines.replicas.events import Batch, Begin, Command, Drop, Lost, Poll, Ready
from blendserve.engines.replicas.ledger import MIN_PIECE, Ledger, Phase, middle
from blendserve.errors import ExecutorError


class LedgerMachine(RuleBasedStateMachine):
    """Replicas that do anything a real one may, and things that only a broken network does."""

    @initialize(num_requests=st.integers(0, 90), num_replicas=st.integers(1, 4), seed=st.integers(0, 99))
    def start(self, num_requests: int, num_replicas: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        owners = rng.integers(0, num_replicas, num_requests)
        parts = [np.flatnonzero(owners == replica).astype(np.int64) for replica in range(num_replicas)]
        self.ledger = Ledger(parts, rng.permutation(num_requests).astype(np.int64))
        self.held: list[set[int]] = [set() for _ in parts]  # the twin: what each process works on
        self.lease = [0] * num_replicas
        self.old: list[Batch] = []
        self.done: list[int] = []
        self.dropped: set[int] = set()
        self.num_requests = num_requests

    def note(self, command: Command) -> None:
        if isinstance(command, Begin):
            assert not self.held[command.replica], "a replica that works is given more"
            assert len(command.requests)
            assert not set(command.requests.tolist()) & set().union(set(self.done), *self.held), "sent twice"
            assert not set(command.requests.tolist()) & self.dropped, "nobody wants it"
            assert (np.diff(command.requests) > 0).all()
            self.held[command.replica] = set(command.requests.tolist())
            self.lease[command.replica] = command.lease

    @rule()
    def drive(self) -> None:
        run_commands(self.ledger, self.note)

    @rule(replica=st.integers(0, 3))
    def comes_up(self, replica: int) -> None:
        if replica < len(self.held) and self.ledger.replicas[replica].phase is Phase.ABSENT:
            self.ledger.apply(Ready(replica))

    @rule(replica=st.integers(0, 3), share=st.floats(0, 1), returned=st.floats(0, 1))
    def answers(self, replica: int, share: float, returned: float) -> None:
        if replica >= len(self.held) or not self.ledger.replicas[replica].is_polled:
            return
        held = sorted(self.held[replica])
        ended = held[: int(np.ceil(len(held) * share))]
        given = held[len(ended) :]
        is_asked = self.ledger.replicas[replica].share_asked > 0
        given = given[: int(len(given) * returned)] if is_asked else []
        left = self.held[replica] - {*ended, *given}
        happened = batch(replica, self.lease[replica], ended, given, is_drained=not left)
        accepted = [output.index for output in self.ledger.apply(happened)]
        assert accepted == [row for row in ended if row not in self.dropped]
        self.done += accepted
        self.held[replica] = left
        self.old.append(happened)
        self.settle()

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def an_answer_comes_twice(self, data: st.DataObject) -> None:
        assert list(self.ledger.apply(data.draw(st.sampled_from(self.old)))) == []

    @rule(replica=st.integers(0, 3), is_final=st.booleans())
    def dies(self, replica: int, is_final: bool) -> None:
        if replica < len(self.held):
            self.ledger.apply(Lost(replica, is_final, "killed"))
            self.held[replica] = set()
            self.settle()

    @rule(rows=st.sets(st.integers(0, 89), max_size=20))
    def nobody_wants(self, rows: set[int]) -> None:
        wanted = {row for row in rows if row < self.num_requests}
        self.ledger.withdraw(np.array(sorted(wanted), np.int64))
        self.dropped |= wanted - set(self.done)

    @rule(chance=st.integers(0, 9))
    def begins_no_more(self, chance: int) -> None:
        if not chance:
            self.ledger.end_early()
            self.settle()

    def settle(self) -> None:
        """What has not begun never does, once the run is to end early."""
        if self.ledger.begins_no_more:
            begun = set().union(set(self.done), *self.held)
            self.dropped |= set(range(self.num_requests)) - begun

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.check()
            assert len(set(self.done)) == len(self.done) == self.ledger.num_journalled - len(self.dropped)

    def teardown(self) -> None:
        """From any state, replicas that work in peace finish the job, unless all are gone."""
        if not hasattr(self, "ledger"):
            return
        for _ in range(1000):
            if self.ledger.is_done or self.ledger.is_hopeless:
                break
            for replica in range(len(self.held)):
                self.comes_up(replica)
            run_commands(self.ledger, self.note)
            for replica in range(len(self.held)):
                self.answers(replica, 0.6, 0.6)
        assert self.ledger.is_hopeless or sorted({*self.done, *self.dropped}) == list(range(self.num_requests))


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_every_replica_begins_with_its_own_part() -> None:
    ledger = ledger_of([40, 60], ready=True)
    begun = [command for command in run_commands(ledger) if isinstance(command, Begin)]
    assert [(begin.replica, len(begin.requests)) for begin in begun] == [(0, 40), (1, 60)]
    assert begun[1].requests.tolist() == list(range(40, 100))


def test_a_restarted_replica_gets_what_it_had_not_finished_under_a_new_lease() -> None:
    ledger = ledger_of([4, 4], ready=True)
    run_commands(ledger)
    ledger.apply(batch(0, 1, [0, 1]))
    ledger.apply(Lost(0, False, "killed"))
    assert not any(isinstance(command, Begin) for command in run_commands(ledger)), "nobody else is idle"
    ledger.apply(Ready(0))
    begin, poll = run_commands(ledger)
    assert isinstance(begin, Begin)
    assert (begin.replica, begin.lease, begin.requests.tolist()) == (0, 2, [2, 3])
    assert isinstance(poll, Poll)
    assert list(ledger.apply(batch(0, 1, [2, 3]))) == [], "an answer of the lease that is lost"
    assert [output.index for output in ledger.apply(batch(0, 2, [2, 3], is_drained=True))] == [2, 3]


def test_after_the_last_restart_the_others_take_over() -> None:
    ledger = ledger_of([4, 4], ready=True)
    run_commands(ledger)
    ledger.apply(Lost(0, True, "killed"))
    assert run_commands(ledger) == [], "replica 1 works and is polled"
    ledger.apply(batch(1, 1, [4, 5, 6, 7], is_drained=True))
    (begin, _) = run_commands(ledger)
    assert isinstance(begin, Begin)
    assert (begin.replica, begin.requests.tolist()) == (1, [0, 1, 2, 3])
    assert ledger.num_stolen == 4
    ledger.apply(Lost(1, True, "killed too"))
    assert ledger.is_hopeless


def test_an_idle_replica_is_given_what_a_busy_one_has_not_started() -> None:
    ledger = ledger_of([2, 400, 100], ready=True)
    run_commands(ledger)
    ledger.apply(batch(0, 1, [0, 1], is_drained=True))
    assert run_commands(ledger) == [], "both others have been asked without a share; they are asked again"
    ledger.apply(batch(2, 1, []))
    assert run_commands(ledger) == [Poll(2, 1, 0.0)], "replica 1 has more"
    ledger.apply(batch(1, 1, []))
    assert run_commands(ledger) == [Poll(1, 1, 0.5)]
    ledger.apply(batch(1, 1, [2], returned=list(range(100, 300))))
    begin, *polls = run_commands(ledger)
    assert isinstance(begin, Begin)
    assert (begin.replica, begin.requests.tolist()) == (0, list(range(100, 300)))
    assert set(polls) == {Poll(0, 2, 0.0), Poll(1, 1, 0.0)}


def test_a_replica_that_has_started_everything_is_not_asked_again() -> None:
    ledger = ledger_of([1, 5], ready=True)
    run_commands(ledger)
    ledger.apply(batch(0, 1, [0], is_drained=True))
    ledger.apply(batch(1, 1, []))
    assert run_commands(ledger) == [Poll(1, 1, 0.5)]
    ledger.apply(batch(1, 1, []))
    assert run_commands(ledger) == [Poll(1, 1, 0.0)]


def test_what_an_absent_replica_has_not_begun_is_taken_from_the_middle() -> None:
    ledger = ledger_of([1, 200], ready=False)
    ledger.apply(Ready(0))
    run_commands(ledger)
    ledger.apply(batch(0, 1, [0], is_drained=True))
    begin, _ = run_commands(ledger)
    assert isinstance(begin, Begin)
    assert begin.requests.tolist() == list(range(51, 151))
    ledger.apply(Ready(1))
    begin, _ = run_commands(ledger)
    assert isinstance(begin, Begin)
    assert begin.requests.tolist() == [*range(1, 51), *range(151, 201)]


def test_pieces_of_nobody_are_shared_among_the_idle_and_not_too_small() -> None:
    ledger = ledger_of([0, 0, 300, 40], ready=True)
    run_commands(ledger)
    ledger.apply(Lost(2, True, "killed"))
    sizes = [len(command.requests) for command in run_commands(ledger) if isinstance(command, Begin)]
    assert sizes == [150, 150]
    ledger.apply(Lost(3, True, "killed"))
    for replica in (0, 1):
        held = np.flatnonzero(ledger._place == replica).tolist()
        ledger.apply(batch(replica, 1, held, is_drained=True))
    sizes = [len(command.requests) for command in run_commands(ledger) if isinstance(command, Begin)]
    assert sizes == [MIN_PIECE, 40 - MIN_PIECE]


def test_an_engine_that_ends_early_is_an_error() -> None:
    ledger = ledger_of([3], ready=True)
    run_commands(ledger)
    with pytest.raises(ExecutorError, match="2 requests unanswered"):
        ledger.apply(batch(0, 1, [0], is_drained=True))


def test_an_engine_that_answers_twice_counts_once() -> None:
    ledger = ledger_of([3], ready=True)
    run_commands(ledger)
    twice = Batch(0, 1, [answer_of(0), answer_of(0)], np.zeros(0, np.int64), False)
    assert len(ledger.apply(twice)) == 1
    ledger.check()


def test_the_middle() -> None:
    rows = np.arange(9)
    assert middle(rows, 3).tolist() == [3, 4, 5]
    assert middle(rows, 0).tolist() == []
    assert middle(rows, 40).tolist() == rows.tolist()


def test_a_replica_is_told_once_what_nobody_wants_any_more() -> None:
    ledger = ledger_of([40, 60], ready=True)
    run_commands(ledger)
    ledger.withdraw(np.arange(30, 50, dtype=np.int64))
    drops = [command for command in run_commands(ledger) if isinstance(command, Drop)]
    assert [(drop.replica, drop.lease, drop.requests.tolist()) for drop in drops] == [
        (0, 1, list(range(30, 40))),
        (1, 1, list(range(40, 50))),
    ]
    assert not any(isinstance(command, Drop) for command in run_commands(ledger))
    assert [output.index for output in ledger.apply(batch(0, 1, range(35)))] == list(range(30))


def test_a_run_that_ends_early_asks_for_all_that_is_not_begun() -> None:
    ledger = ledger_of([40, 60], ready=True)
    run_commands(ledger)
    ledger.end_early()
    assert not ledger.is_done
    for replica in range(2):
        ledger.apply(batch(replica, 1, []))
    assert run_commands(ledger) == [Poll(0, 1, 1.0), Poll(1, 1, 1.0)]
    for replica, rows in ((0, range(5, 40)), (1, range(45, 100))):
        ledger.apply(batch(replica, 1, [], rows))
    run_commands(ledger)
    assert not ledger.is_done
    for replica, rows in ((0, range(5)), (1, range(40, 45))):
        assert len(ledger.apply(batch(replica, 1, rows, is_drained=True))) == 5
    assert ledger.is_done

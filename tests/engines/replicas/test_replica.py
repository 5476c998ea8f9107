"""One replica and what it works on, in this process: leases, giving back, failures, the wait for a slow driver."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from batch_fakes import answer
from parallel_cases import FakeReplicaEngine

from blendserve.engines.replicas.part import GivenBackError, JobPart, SharedJob
from blendserve.engines.replicas.replica import MAX_BATCH, Replica, Reply
from blendserve.errors import BlendServeError, CapacityError, ConfigError, ExecutorError, RequestError
from blendserve.job.pending import PendingRequests
from blendserve.planner.tree import PrefixTree
from blendserve.request import SequenceOutput


def part_of(job: SharedJob, rows: list[int]) -> JobPart:
    return JobPart(job, job.store(), np.array(rows, np.int64))


def replica_of(engine: FakeReplicaEngine, job: SharedJob) -> Replica:
    replica = Replica(lambda: engine)
    assert replica.hello(job).error is None
    return replica


def take_all(replica: Replica, lease: int) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    while not (reply := replica.take(lease, 0.0, 5.0)).is_drained:
        assert reply.is_known
        assert reply.error is None
        outputs += reply.outputs
    return [*outputs, *reply.outputs]


def until(is_so: Callable[[], bool]) -> None:
    for _ in range(2000):
        if is_so():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to be")


def fail_after(count: int, error: BaseException) -> Callable[[int], None]:
    def fail(num_answers: int) -> None:
        if num_answers == count:
            raise error

    return fail


# Parts


def test_a_part_holds_its_rows_of_the_job(pending: PendingRequests, shared_job: SharedJob) -> None:
    rows = [1, 5, 6, 40]
    part = part_of(pickle.loads(pickle.dumps(shared_job)), rows)
    assert len(part) == 4
    for index, row in enumerate(rows):
        theirs, ours = pending[row], part[index]
        assert ours.index == index
        assert ours.prompt_token_ids.tolist() == theirs.prompt_token_ids.tolist()
        assert (ours.sampling, ours.seed, ours.max_output_tokens) == (
            theirs.sampling,
            theirs.seed,
            theirs.max_output_tokens,
        )
    assert part.table().num_prompt_tokens.tolist() == pending.table().num_prompt_tokens[rows].tolist()


def test_the_tree_of_a_part_is_that_of_its_prompts(shared_job: SharedJob) -> None:
    part = part_of(shared_job, list(range(3, 90, 2)))
    cut, built = part.prefix_tree(), PrefixTree.from_flat(part.flat_prompts())
    for name in PrefixTree.__slots__:
        assert np.array_equal(getattr(cut, name), getattr(built, name)), name


def test_what_the_engine_has_not_looked_up_is_given_back(shared_job: SharedJob) -> None:
    part = part_of(shared_job, list(range(10, 30)))
    for index in (0, 1, 19):
        part[index]
    given = part.give_back(0.5)
    assert len(given) == 9
    assert not {10, 11, 29} & set(given.tolist())
    for index in range(20):
        assert part.is_given_back(index) == (10 + index in given)
    with pytest.raises(GivenBackError):
        part[int(given[0]) - 10]
    ranks = np.sort(shared_job.rank[given])
    kept = np.array([row for row in range(12, 29) if row not in given])
    assert ((shared_job.rank[kept] < ranks[0]) | (shared_job.rank[kept] > ranks[-1])).all(), (
        "what is given is together in the plan"
    )
    assert len(part.give_back(1.0)) == 8
    assert len(part.give_back(1.0)) == 0


def test_no_request_is_both_taken_and_given_back(shared_job: SharedJob) -> None:
    part = part_of(shared_job, list(range(100)))
    given: list[int] = []
    giver = threading.Thread(target=lambda: given.extend(row for _ in range(50) for row in part.give_back(0.05)))
    giver.start()
    taken = []
    for index in range(100):
        try:
            taken.append(part[index].index)
        except GivenBackError:
            time.sleep(0)
    giver.join()
    assert sorted([*taken, *given]) == list(range(100))


def test_errors_of_requests_survive_the_way_to_the_driver() -> None:
    error = pickle.loads(pickle.dumps(RequestError("too long", code="context_length", param="prompt", status_code=413)))
    assert (str(error), error.code, error.param, error.status_code) == ("too long", "context_length", "prompt", 413)
    assert isinstance(pickle.loads(pickle.dumps(GivenBackError())), RequestError)


# Replicas


def test_a_replica_answers_its_lease_in_rows_of_the_job(pending: PendingRequests, shared_job: SharedJob) -> None:
    replica = replica_of(FakeReplicaEngine(), shared_job)
    replica.begin(1, np.array([3, 4, 50], np.int64))
    outputs = take_all(replica, 1)
    assert [output.index for output in outputs] == [3, 4, 50]
    assert [output.token_ids.tolist() for output in outputs] == [
        answer(pending[row]).token_ids.tolist() for row in (3, 4, 50)
    ]
    replica.begin(2, np.array([7], np.int64))
    assert [output.index for output in take_all(replica, 2)] == [7]


def test_what_is_given_back_is_not_answered(shared_job: SharedJob) -> None:
    is_held = threading.Event()
    replica = replica_of(FakeReplicaEngine(fail=lambda count: None if count < 2 else _wait(is_held)), shared_job)
    replica.begin(1, np.arange(40, dtype=np.int64))
    outputs: list[SequenceOutput] = []
    while len(outputs) < 2:
        outputs += replica.take(1, 0.0, 5.0).outputs
    reply = replica.take(1, 1.0, 5.0)
    is_held.set()
    outputs += [*reply.outputs, *take_all(replica, 1)]
    assert len(reply.returned)
    assert sorted([*(output.index for output in outputs), *reply.returned.tolist()]) == list(range(40))
    assert all(output.error is None for output in outputs)


def _wait(event: threading.Event) -> None:
    assert event.wait(10)


def test_an_engine_waits_for_a_slow_driver(shared_job: SharedJob) -> None:
    engine = FakeReplicaEngine()
    numbers, rank = np.tile(shared_job.numbers, 8), np.tile(shared_job.rank, 8)
    many = replace(shared_job, numbers=numbers, rank=rank)
    replica = replica_of(engine, many)
    replica.begin(1, np.arange(len(many.numbers), dtype=np.int64))
    until(lambda: engine.num_answers > MAX_BATCH)
    time.sleep(0.05)
    assert engine.num_answers <= MAX_BATCH + 2 < len(many.numbers)
    assert len(take_all(replica, 1)) == len(many.numbers)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (ExecutorError("the device is gone"), ExecutorError),
        (CapacityError("no memory"), CapacityError),
        (ZeroDivisionError("a bug"), ExecutorError),
        (SystemExit(3), ExecutorError),
    ],
)
def test_an_engine_that_fails_is_reported_after_its_answers(
    shared_job: SharedJob, error: BaseException, seen: type[BlendServeError], capfd: pytest.CaptureFixture[str]
) -> None:
    replica = replica_of(FakeReplicaEngine(fail=fail_after(3, error)), shared_job)
    replica.begin(1, np.arange(20, dtype=np.int64))
    replies: list[Reply] = [replica.take(1, 0.0, 5.0)]
    while replies[-1].error is None:
        replies.append(replica.take(1, 0.0, 5.0))
    assert [output.index for reply in replies for output in reply.outputs] == [0, 1, 2]
    assert type(replies[-1].error) is seen
    assert str(error) in str(replies[-1].error)
    assert not any(reply.is_drained for reply in replies)
    assert ("Traceback" in capfd.readouterr().err) == (not isinstance(error, BlendServeError))


def test_an_engine_that_does_not_open_says_why(shared_job: SharedJob) -> None:
    def fail() -> FakeReplicaEngine:
        raise ConfigError("no such model here")

    hello = Replica(fail).hello(shared_job)
    assert isinstance(hello.error, ConfigError)


def test_a_lease_of_another_process_is_not_known(shared_job: SharedJob) -> None:
    replica = replica_of(FakeReplicaEngine(), shared_job)
    assert not replica.take(1, 0.0, 0.0).is_known
    replica.begin(2, np.array([1], np.int64))
    assert not replica.take(1, 0.0, 0.0).is_known


def test_a_new_lease_drops_the_one_before_it(shared_job: SharedJob) -> None:
    replica = replica_of(FakeReplicaEngine(answer_s=0.002), shared_job)
    replica.begin(1, np.arange(100, dtype=np.int64))
    replica.begin(2, np.array([100, 101], np.int64))
    assert [output.index for output in take_all(replica, 2)] == [100, 101]


def test_closing_stops_the_engine(shared_job: SharedJob) -> None:
    engine = FakeReplicaEngine(answer_s=0.002)
    replica = replica_of(engine, shared_job)
    replica.begin(1, np.arange(100, dtype=np.int64))
    replica.close()
    assert engine.is_closed
    assert engine.num_answers < 100
    assert not any(thread.name.startswith("lease-") for thread in threading.enumerate())

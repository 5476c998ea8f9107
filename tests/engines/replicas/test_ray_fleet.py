"""What a fleet makes of what Ray tells it, on a Ray that follows a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from parallel_cases import answer_of, ledger_of

from blendserve.engines.replicas import ray_fleet
from blendserve.engines.replicas.cluster import ReplicaShape
from blendserve.engines.replicas.drive import drive
from blendserve.engines.replicas.events import Begin, Event, Lost, Poll, Ready
from blendserve.engines.replicas.ledger import Ledger
from blendserve.engines.replicas.ray_fleet import Expected, RayFleet
from blendserve.engines.replicas.replica import Hello, Reply
from blendserve.engines.settings import ReplicaSettings
from blendserve.errors import BlendServeError, ConfigError, ExecutorError
from blendserve.job.pending import PendingRequests
from blendserve.request import SequenceOutput

WANTED = PendingRequests(cast(Any, None), np.zeros(0, np.int64))
"""Nothing of it is ever dropped."""

REFUSED = ExecutorError("http://localhost:1/v1 answered 401: no such key")
IDS = "The actor died unexpectedly before finishing this task.\n\tclass_name: Replica\n\tactor_id: 7\n\tip: 10.0.0.2\n"
GUESSES = "There are some potential root causes. " + "(1) The process is killed by SIGKILL. " * 9


class RayError(Exception):
    """Root of Ray's errors."""


class RayTaskError(RayError):
    """A method raised."""


class ActorDiedError(RayError):
    """No process will answer any more."""

    actor_init_failed = False


class ActorUnavailableError(RayError):
    """The process did not answer this call."""


class FakeRay:
    """As much of Ray as a fleet touches. `script`: what each replica answers to `hello` and `take`, call by call, the
    last of them for good; None keeps a call waiting, an exception is raised.
    """

    exceptions = SimpleNamespace(
        RayError=RayError,
        RayTaskError=RayTaskError,
        ActorDiedError=ActorDiedError,
        ActorUnavailableError=ActorUnavailableError,
    )

    def __init__(self, *script: Mapping[str, Sequence[Any]]) -> None:
        self.killed: list[tuple[int, bool]] = []
        self.num_begun = 0
        self._script = script
        self._num_actors = 0
        self._result_by_ref: dict[int, Any] = {}

    def remote(self, _cls: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._actor))

    def put(self, value: Any) -> Any:
        return value

    def wait(self, refs: list[int], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[int], list[int]]:  # noqa: ARG002
        done = [ref for ref in refs if self._result_by_ref[ref] is not None]
        return done[:num_returns], done[num_returns:]

    def get(self, ref: int) -> Any:
        result = self._result_by_ref[ref]
        if isinstance(result, Exception):
            raise result
        return result

    def kill(self, actor: Any, *, no_restart: bool) -> None:
        self.killed.append((actor.index, no_restart))

    def _actor(self, _open_engine: Any) -> Any:
        index = self._num_actors
        self._num_actors += 1
        calls = {name: self._method(self._answers(results)) for name, results in self._script[index].items()}
        return SimpleNamespace(index=index, begin=SimpleNamespace(remote=self._begin), **calls)

    def _begin(self, *_: Any) -> None:
        self.num_begun += 1

    def _method(self, answers: Iterator[Any]) -> Any:
        def call(*_: Any) -> int:
            ref = len(self._result_by_ref)
            self._result_by_ref[ref] = next(answers)
            return ref

        return SimpleNamespace(remote=call)

    @staticmethod
    def _answers(results: Sequence[Any]) -> Iterator[Any]:
        yield from results
        while True:
            yield results[-1]


def reply(*rows: int, error: BlendServeError | None = None) -> Reply:
    return Reply(True, tuple(answer_of(row) for row in rows), np.zeros(0, np.int64), False, error)


def up(incarnation: str = "first") -> Hello:
    return Hello(incarnation, "tiny@1", {})


def fleet_of(fake: FakeRay, num_replicas: int = 2, told: list[str] | None = None, **fields: Any) -> RayFleet:
    settings = ReplicaSettings(num_replicas, num_cpus=1)
    told = [] if told is None else told
    options: dict[str, Any] = {"is_restartable": True, **fields}
    job: Any = None
    return RayFleet(
        fake,
        settings,
        ReplicaShape(1, 0, 2),
        lambda: pytest.fail("nobody opens an engine here"),
        job,
        Expected("tiny@1", {}),
        notify=told.append,
        **options,
    )


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_fleet, "_GREETING_PAUSE_S", 0.0)


def read(outputs: Iterator[SequenceOutput], rows: list[int]) -> None:
    """Note the rows that are answered, also those before an error."""
    for output in outputs:
        rows.append(output.index)  # noqa: PERF401


def answered(ledger: Ledger, fleet: RayFleet, error: type[BaseException], message: str) -> list[int]:
    """Rows that are answered until `error` is raised."""
    rows: list[int] = []
    with pytest.raises(error, match=message):
        read(drive(ledger, fleet, WANTED), rows)
    return sorted(rows)


def interrupted(outputs: Any) -> Iterator[SequenceOutput]:
    """The answers that are left when an interrupt strikes their consumer."""
    yield outputs.throw(KeyboardInterrupt())
    yield from outputs


# Answers that come with an end


@pytest.mark.parametrize("failing", [0, 1])
def test_answers_that_come_with_an_error_count(failing: int) -> None:
    """Those of the engine that fails for good, and those of the others in the same turn."""
    ledger = ledger_of([4, 4], ready=False)
    takes = [[reply(0, 1)], [reply(4, 5, 6)]]
    takes[failing] = [takes[failing][0]._replace(error=REFUSED)]
    scripts: list[dict[str, Any]] = [{"hello": [up()], "take": [*take, reply()]} for take in takes]
    fake = FakeRay(*scripts)
    fleet = fleet_of(fake, is_restartable=False)
    assert answered(ledger, fleet, ExecutorError, "answered 401") == [0, 1, 4, 5, 6]
    ledger.check()


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (Hello("first", "other@1", {}), "would give other answers"),
        (Hello("first", error=ConfigError("no such model")), "no such model"),
        (RayTaskError("ray::Replica.hello()\nKeyError: 'x'"), "replica 1 failed: KeyError"),
    ],
    ids=["other model", "wrong setting", "bug"],
)
def test_answers_that_come_beside_a_replica_that_is_refused_count(hello: Any, message: str) -> None:
    ledger = ledger_of([3, 3], ready=False)
    fake = FakeRay({"hello": [up()], "take": [reply(0, 1)]}, {"hello": [ActorUnavailableError(), hello]})
    assert answered(ledger, fleet_of(fake), BlendServeError, message) == [0, 1]


def test_an_interrupt_keeps_what_replicas_have_at_hand() -> None:
    """What has come and is not consumed, and what comes where they are asked again; who is silent is not waited for."""
    ledger = ledger_of([4, 4], ready=False)
    fake = FakeRay({"hello": [up()], "take": [reply(0, 1, 2), reply(3)]}, {"hello": [up()], "take": [None]})
    outputs: Any = drive(ledger, fleet_of(fake), WANTED)
    assert next(outputs).index == 0
    rows: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        read(interrupted(outputs), rows)
    assert rows == [1, 2, 3]
    assert ledger.num_journalled == 4


def test_a_second_interrupt_ends_at_once() -> None:
    ledger = ledger_of([4], ready=False)
    outputs: Any = drive(ledger, fleet_of(FakeRay({"hello": [up()], "take": [reply(0, 1, 2)]}), 1), WANTED)
    next(outputs)
    assert next(interrupted(outputs)).index == 1
    with pytest.raises(KeyboardInterrupt):
        next(interrupted(outputs))
    assert list(outputs) == []


def test_collecting_begins_nothing_and_hears_no_failures() -> None:
    fake = FakeRay(
        {"hello": [up()], "take": [reply(0)._replace(is_drained=True)]},
        {"hello": [up()], "take": [ActorDiedError("gone")]},
        {"hello": [up()], "take": [reply(5, error=REFUSED)]},
    )
    fleet = fleet_of(fake, 3)
    assert fleet.collect() == ()
    assert sorted(fleet.wait()) == [Ready(0), Ready(1), Ready(2)]
    for replica in range(3):
        fleet.execute(Begin(replica, 1, np.arange(2)))
        fleet.execute(Poll(replica, 1, 0.0))
    batches = fleet.collect()
    assert [(batch.replica, [output.index for output in batch.outputs]) for batch in batches] == [(0, [0]), (2, [5])]
    assert fake.killed == []


# Engines that do not open


def events_of(fleet: RayFleet, num_calls: int) -> list[Event]:
    return [event for _ in range(num_calls) for event in fleet.wait()]


def test_an_engine_that_does_not_open_is_started_anew_beside_healthy_ones() -> None:
    broken = Hello("first", error=ExecutorError("no memory on the device"))
    fake = FakeRay({"hello": [broken, broken, up("second")]}, {"hello": [up()]})
    told: list[str] = []
    fleet = fleet_of(fake, told=told)
    assert list(fleet.wait()) == [Lost(0, False, "no memory on the device"), Ready(1)]
    assert fake.killed == [(0, False)]
    assert list(fleet.wait()) == [], "the process that is to be killed still answers"
    assert list(fleet.wait()) == [Ready(0)]
    assert told[-1] == "replica 0 is back"


def test_an_engine_that_never_opens_is_lost_for_good() -> None:
    tries = [Hello(str(number), error=ExecutorError("no memory on the device")) for number in range(2)]
    fake = FakeRay({"hello": [*tries, ActorDiedError("")]}, {"hello": [up()]})
    fleet = fleet_of(fake)
    lost = [event for event in events_of(fleet, 3) if isinstance(event, Lost)]
    assert [event.is_final for event in lost] == [False, False, True]
    assert {event.reason for event in lost} == {"no memory on the device"}
    assert fake.killed == [(0, False), (0, False)]


@pytest.mark.parametrize(
    ("error", "is_restartable"), [(ConfigError("wrong"), True), (ExecutorError("wrong"), False)], ids=str
)
def test_an_engine_that_no_new_process_can_help_ends_the_run(error: BlendServeError, is_restartable: bool) -> None:
    fleet = fleet_of(FakeRay({"hello": [Hello("first", error=error)]}), 1, is_restartable=is_restartable)
    assert list(fleet.wait()) == []
    with pytest.raises(type(error), match="wrong"):
        fleet.wait()


# Why a replica is lost


def died(text: str, *, in_init: bool = False) -> ActorDiedError:
    error = ActorDiedError(text)
    error.actor_init_failed = in_init
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            lambda: died(
                "The actor died because of an error raised in its creation task, ray::Replica.__init__() (pid=7)\n"
                "RuntimeError: The actor with name Replica failed to import on the worker:\n\n"
                "Traceback (most recent call last):\nModuleNotFoundError: No module named 'blendserve'\n",
                in_init=True,
            ),
            "ModuleNotFoundError: No module named 'blendserve'",
        ),
        (lambda: died(f"{IDS}The actor is dead because its node has died.\nMore."), "dead because its node has died"),
        (lambda: died("The actor died unexpectedly."), "The actor died unexpectedly"),
        (lambda: died(""), "ActorDiedError"),
        (lambda: died(f"{IDS}Its process has died. {GUESSES}"), "Its process has died. There are some potential"),
    ],
    ids=["not installed", "node died", "one line", "no word", "guesses"],
)
def test_the_reason_of_a_loss_is_what_ray_says_most_tellingly(error: Callable[[], Exception], reason: str) -> None:
    told: list[str] = []
    (lost,) = fleet_of(FakeRay({"hello": [error()]}), 1, told).wait()
    assert isinstance(lost, Lost)
    assert reason in lost.reason
    assert lost.reason in told[-1]
    assert len(lost.reason) <= 200
    assert "\n" not in lost.reason


def test_rays_own_errors_are_understood() -> None:
    """The texts above are Ray's."""
    errors: Any = pytest.importorskip("ray.exceptions", reason="Ray is not installed: pip install 'ray>=2.50'")
    trace = "Traceback (most recent call last):\nModuleNotFoundError: No module named 'blendserve'"
    task = errors.RayTaskError("__init__", trace, RuntimeError("import"), "ray::Replica", 7, "10.0.0.2")
    assert ray_fleet._cause(errors.ActorDiedError(task)) == "ModuleNotFoundError: No module named 'blendserve'"

"""Replicas as Ray actors. Ray starts a lost process anew, elsewhere if need be; what it had in flight, the ledger sends
again: Ray retries no call.

After any failure of a call a replica counts as lost, and is greeted until it answers or Ray has given it up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from textwrap import shorten
from typing import Any, NamedTuple

from blendserve.engines.replicas.cluster import ReplicaShape, first_line
from blendserve.engines.replicas.events import Batch, Begin, Command, Drop, Event, Lost, Poll, Ready
from blendserve.engines.replicas.part import SharedJob
from blendserve.engines.replicas.replica import Hello, OpenEngine, Replica, Reply
from blendserve.engines.settings import ReplicaSettings
from blendserve.errors import BlendServeError, ConfigError, ExecutorError

POLL_S = 0.25
"""How long a replica waits for something to tell: also how long one waits that could take over work."""
_WAIT_S = 1.0
_GREETING_PAUSE_S = 0.5
_PATIENCE_S = 20.0  # before a replica that does not come up is mentioned
_CLOSE_S = 10.0
_MAX_CAUSE = 200  # characters: Ray's guesses at why a process died are a paragraph


class Expected(NamedTuple):
    """What all answers depend on beside the input: every replica's engine must say the same."""

    identity: str
    settings: Mapping[str, Any]


@dataclass(slots=True)
class _Member:
    """`incarnation` is the latest process that was greeted; `is_doomed`: it is to be killed, and not to be trusted."""

    actor: Any
    greeted_s: float
    incarnation: str = ""
    is_up: bool = False
    is_doomed: bool = False
    is_told: bool = False
    lost_because: str = ""


class RayFleet:
    """The actors of one run. `is_restartable`: an engine that fails may do better in a new process; else it ends the
    run. `notify` is told, one line at a time, of replicas that come and go.
    """

    def __init__(
        self,
        ray: Any,
        settings: ReplicaSettings,
        shape: ReplicaShape,
        open_engine: OpenEngine,
        job: SharedJob,
        expected: Expected,
        *,
        is_restartable: bool,
        notify: Callable[[str], None],
    ) -> None:
        self._ray = ray
        self._expected = expected
        self._is_restartable = is_restartable
        self._notify = notify
        self._shared = ray.put(job)
        actor = ray.remote(Replica).options(
            num_cpus=shape.num_cpus,
            num_gpus=shape.num_gpus,
            max_restarts=settings.max_restarts,
            max_task_retries=0,
            scheduling_strategy="SPREAD" if settings.placement == "spread" else "DEFAULT",
        )
        now_s = time.monotonic()
        self._members = [_Member(actor.remote(open_engine), now_s) for _ in range(settings.num_replicas)]
        self.first_up_s: float | None = None  # when a replica first had nothing to do, by time.perf_counter
        self._call_by_ref: dict[Any, tuple[int, int | None]] = {}  # replica and lease; None is a greeting
        self._greet_at_s: dict[int, float] = dict.fromkeys(range(settings.num_replicas), now_s)
        self._failure: BlendServeError | None = None  # ends the run once what came with it is applied

    def execute(self, command: Command) -> None:
        """Send one call."""
        actor = self._members[command.replica].actor
        match command:
            case Begin():
                actor.begin.remote(command.lease, command.requests)  # if it is lost, so is the poll that follows
            case Drop():
                actor.drop.remote(command.lease, command.requests)  # if it is lost, work is done for nobody
            case Poll():
                ref = actor.take.remote(command.lease, command.share, POLL_S)
                self._call_by_ref[ref] = (command.replica, command.lease)

    def wait(self) -> Sequence[Event]:
        """What has come, after a second at most. Raises: BlendServeError that ends the run, one call after it came."""
        if self._failure is not None:
            raise self._failure
        self._greet()
        refs = list(self._call_by_ref)
        if not refs:
            time.sleep(_GREETING_PAUSE_S / 2)
            return ()
        self._ray.wait(refs, timeout=_WAIT_S)
        done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        events: list[Event] = []
        for ref in done:
            try:
                for event in self._hear(ref):
                    events.append(event)  # noqa: PERF402  (what comes before an error counts)
            except BlendServeError as error:
                self._failure = self._failure or error
        return events

    def collect(self) -> Sequence[Batch]:
        """Answers to polls, after a second at most; what ails replicas does not matter any more."""
        polls = {ref: (replica, lease) for ref, (replica, lease) in self._call_by_ref.items() if lease is not None}
        if not polls:
            return ()
        done, _ = self._ray.wait(list(polls), num_returns=len(polls), timeout=_WAIT_S)
        batches: list[Batch] = []
        for ref in done:
            with suppress(self._ray.exceptions.RayError):
                reply: Reply = self._ray.get(ref)
                batches.append(Batch(*polls[ref], reply.outputs, reply.returned, is_drained=False))
        return batches

    def close(self, *, is_at_ease: bool) -> None:
        """End all processes; let engines close first where there is time."""
        if is_at_ease:
            ups = [member.actor.close.remote() for member in self._members if member.is_up]
            if ups:
                self._ray.wait(ups, num_returns=len(ups), timeout=_CLOSE_S)
        for member in self._members:
            self._ray.kill(member.actor, no_restart=True)

    def _hear(self, ref: Any) -> Iterator[Event]:
        replica, lease = self._call_by_ref.pop(ref)
        return self._welcome(replica, ref) if lease is None else self._receive(replica, lease, ref)

    # Greetings

    def _greet(self) -> None:
        now_s = time.monotonic()
        for replica in [replica for replica, due_s in self._greet_at_s.items() if due_s <= now_s]:
            del self._greet_at_s[replica]
            self._call_by_ref[self._members[replica].actor.hello.remote(self._shared)] = (replica, None)
        for replica, lease in self._call_by_ref.values():
            member = self._members[replica]
            if lease is None and not member.is_told and now_s > member.greeted_s + _PATIENCE_S:
                member.is_told = True
                self._notify(f"replica {replica} is not up yet: Ray looks for a place, or its engine opens")

    def _greet_again(self, replica: int, pause_s: float) -> None:
        self._greet_at_s[replica] = time.monotonic() + pause_s

    def _welcome(self, replica: int, ref: Any) -> Iterator[Event]:
        member = self._members[replica]
        errors = self._ray.exceptions
        try:
            hello: Hello = self._ray.get(ref)
        except errors.ActorDiedError as error:
            reason = member.lost_because or _cause(error)
            self._notify(f"replica {replica} is lost and will not be started again ({reason}); the others take over")
            yield Lost(replica, True, reason)
            return
        except errors.RayTaskError as error:
            raise ExecutorError(f"replica {replica} failed: {_last_line(error)}") from error
        except errors.RayError:
            self._greet_again(replica, _GREETING_PAUSE_S)
            return
        if member.is_doomed and hello.incarnation == member.incarnation:
            self._greet_again(replica, _GREETING_PAUSE_S)
            return
        member.incarnation, member.is_doomed = hello.incarnation, False
        if hello.error is not None:
            yield self._engine_failed(replica, hello.error)
            return
        self._check(replica, hello)
        if member.lost_because:
            self._notify(f"replica {replica} is back")
        member.is_up = True
        self.first_up_s = self.first_up_s or time.perf_counter()
        yield Ready(replica)

    def _check(self, replica: int, hello: Hello) -> None:
        """Raises: ConfigError when answers of this replica could differ from those of the others."""
        found = {"model": hello.identity, **(hello.settings or {})}
        wanted = {"model": self._expected.identity, **self._expected.settings}
        if found != wanted:
            names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            different = "; ".join(f"{name} is {found.get(name)}, not {wanted.get(name)}" for name in names)
            raise ConfigError(
                f"replica {replica} would give other answers than this machine: {different}; use machines that are "
                "alike, with the same files of the model, or name an --isa that all of them have"
            )

    # Answers

    def _receive(self, replica: int, lease: int, ref: Any) -> Iterator[Event]:
        errors = self._ray.exceptions
        try:
            reply: Reply = self._ray.get(ref)
        except errors.RayTaskError as error:
            raise ExecutorError(f"replica {replica} failed: {_last_line(error)}") from error
        except errors.RayError as error:
            is_gone = isinstance(error, errors.ActorUnavailableError)  # whose text is that of a network library
            yield self._lose(replica, "its process does not answer" if is_gone else _cause(error))
            return
        if not reply.is_known:
            yield self._lose(replica, "its process was started anew")
            return
        yield Batch(replica, lease, reply.outputs, reply.returned, reply.is_drained)
        if reply.error is not None:
            yield self._engine_failed(replica, reply.error)

    def _engine_failed(self, replica: int, error: BlendServeError) -> Lost:
        """Let Ray start the process anew. Raises: the error, where that is of no use."""
        if isinstance(error, ConfigError) or not self._is_restartable:
            raise error
        self._members[replica].is_doomed = True
        self._ray.kill(self._members[replica].actor, no_restart=False)
        return self._lose(replica, str(error))

    def _lose(self, replica: int, reason: str) -> Lost:
        member = self._members[replica]
        member.lost_because, member.greeted_s = reason, time.monotonic()
        member.is_up = member.is_told = False
        self._notify(f"replica {replica} is lost ({reason}); what it had not finished is sent again")
        self._greet_again(replica, 0.0)
        return Lost(replica, False, reason)


def _cause(error: BaseException) -> str:
    """The line of Ray's error that says most: of an actor that could not be made, the end of its traceback; else what
    stands behind the list of its ids; else the first.
    """
    if getattr(error, "actor_init_failed", False):
        return _last_line(error)
    lines = str(error).strip().splitlines()
    behind = (line for before, line in pairwise(lines) if before.startswith("\t") and not line.startswith("\t"))
    return shorten(next(behind, first_line(error)), _MAX_CAUSE, placeholder=" ...").rstrip(".")


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]

"""Requests answered by an OpenAI-compatible server: in the planner's order, many at once, each until it has an end.

An event loop in a thread of its own sends and waits, so that neither a slow disk nor Ctrl-C disturbs it; finished
requests come out of a queue. Which reply means what is in `replies`, when to send in `pacing`, whom in `inflight`.
"""

from __future__ import annotations

import asyncio
import json
import queue
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

from blendserve.engines.http.address import ServerAddress
from blendserve.engines.http.client import MAX_RESPONSE_BYTES, HttpClient, NoReplyError
from blendserve.engines.http.clock import Clock, SystemClock
from blendserve.engines.http.credentials import Credentials
from blendserve.engines.http.inflight import HttpInflight
from blendserve.engines.http.pacing import Pacer, RetrySettings
from blendserve.engines.http.replies import Answer, Failure, Stop, judge, judge_silence, words_of
from blendserve.errors import BlendServeError, ExecutorError, RequestError
from blendserve.job.pending import PendingRequests, withdrawn_error
from blendserve.planner.base import Policy
from blendserve.planner.plan import Plan
from blendserve.request import SequenceOutput, ServerResponse

KEPT = "finished work is kept: run the same command again to go on"
_DROP_S = 0.25
MAX_DOUBTS = 8
"""So many requests that are refused as a wrong address refuses them, with no other answer, mean that it is one."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """`timeout_s`: one try of one request, from the connection to the last byte. `kv_tokens`: what the server's memory
    holds, 0 where it is not known.
    """

    max_inflight: int = 64
    kv_tokens: int = 0
    timeout_s: float = 600.0
    max_response_bytes: int = MAX_RESPONSE_BYTES
    retry: RetrySettings = field(default_factory=RetrySettings)


@dataclass(slots=True)
class HttpStats:
    """What one run sent. `num_sent` counts tries."""

    num_sent: int = 0
    num_answered: int = 0
    num_throttled: int = 0
    num_failures: int = 0
    max_inflight: int = 0


@dataclass(slots=True)
class HttpDispatcher:
    """One server. `notify` is told, one line at a time, when it stops answering and when it answers again."""

    address: ServerAddress
    credentials: Credentials
    settings: HttpLimits = field(default_factory=HttpLimits)
    clock: Clock = field(default_factory=SystemClock)
    random_source: random.Random = field(default_factory=random.Random)
    notify: Callable[[str], None] = lambda _: None
    stats: HttpStats = field(default_factory=HttpStats)
    inflight: HttpInflight | None = None

    def run(self, pending: PendingRequests, plan: Plan, policy: Policy) -> Iterator[SequenceOutput]:
        """Yield the end of every request as it comes; each ends once, whatever the server does.

        Raises: ExecutorError when the server stays down, takes nothing that comes from us, or wants some requests later
        than is worth waiting: they have no end then, all others have.
        """
        self.inflight = HttpInflight(
            plan, policy, max_inflight=self.settings.max_inflight, kv_tokens=self.settings.kv_tokens
        )
        return _Dispatch(self, pending, self.inflight).outputs()


class _Dispatch:
    """One run: the loop's thread, and the queue that leads out of it."""

    def __init__(self, engine: HttpDispatcher, pending: PendingRequests, inflight: HttpInflight) -> None:
        self._engine = engine
        self._settings = engine.settings
        self._clock = engine.clock
        self._pending = pending
        self._inflight = inflight
        self._pacer = Pacer(engine.settings.max_inflight, engine.settings.retry, engine.random_source)
        self._finished: queue.SimpleQueue[SequenceOutput | None] = queue.SimpleQueue()
        self._end: Future[None] = Future()
        self._is_ready = threading.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._is_held = False
        self._is_told = False
        is_first = len(pending) == pending.store.num_requests  # else the address was right once
        self._doubtful: list[SequenceOutput] | None = [] if is_first else None
        self._is_postponed: dict[str | None, bool] = {}  # by model; empty in most runs
        self._num_postponed = 0
        self._last_postponed: Failure | None = None

    # The consumer's side

    def outputs(self) -> Iterator[SequenceOutput]:
        thread = threading.Thread(target=self._work, name="http-engine", daemon=True)
        thread.start()
        self._is_ready.wait()
        try:
            while (output := self._finished.get()) is not None:
                yield output
                if self._is_held:
                    self._call_in_loop(self._freed.set)
            self._end.result()
        except KeyboardInterrupt:
            self._cancel(thread)
            yield from self._left()  # these are paid for
            raise
        finally:
            self._cancel(thread)

    def _left(self) -> Iterator[SequenceOutput]:
        while not self._finished.empty():
            if (output := self._finished.get()) is not None:
                yield output

    def _cancel(self, thread: threading.Thread) -> None:
        self._call_in_loop(self._task.cancel)
        thread.join()

    def _call_in_loop(self, call: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(call)

    # The loop's side

    def _work(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001  (handed to the thread that waits)
            self._end.set_exception(_first_of(error))
        else:
            self._end.set_result(None)
        finally:
            self._is_ready.set()
            self._finished.put(None)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._freed = asyncio.Event()
        self._changed = asyncio.Condition()
        self._is_ready.set()
        settings, engine = self._settings, self._engine
        client = HttpClient(
            engine.address,
            engine.credentials,
            timeout_s=settings.timeout_s,
            max_connections=settings.max_inflight,
            max_response_bytes=settings.max_response_bytes,
        )
        dropping = asyncio.create_task(self._drop_unwanted()) if self._pending.can_be_withdrawn else None
        try:
            async with client, asyncio.TaskGroup() as tasks:
                await self._dispatch(client, tasks)
        finally:
            if dropping is not None:
                dropping.cancel()
        if self._last_postponed is not None:
            raise self._too_early(self._last_postponed)
        if self._doubtful:
            raise self._wrong_address(self._doubtful)

    async def _dispatch(self, client: HttpClient, tasks: asyncio.TaskGroup) -> None:
        """Keep as many requests in flight as may be, until every request is on its way."""
        while self._inflight.num_waiting:
            self._is_held = self._finished.qsize() >= self._settings.max_inflight
            if not (self._is_held and self._finished.qsize()):  # what waits to be written counts as memory
                for index in self._inflight.admit(self._clock.monotonic()):
                    self._tasks[index] = tasks.create_task(self._serve(client, index))
            if self._inflight.num_waiting:
                await self._freed.wait()
                self._freed.clear()

    async def _drop_unwanted(self) -> None:
        """Hang up on the server where nobody wants the answer any more."""
        while True:
            await asyncio.sleep(_DROP_S)
            for index in self._pending.dropped().tolist():
                if (task := self._tasks.get(index)) is not None and task.cancel():
                    self._finish(self._error_output(index, withdrawn_error(), None))

    async def _serve(self, client: HttpClient, index: int) -> None:
        """Ask until there is an end, or the server wants to be asked too late for this run."""
        try:
            self._pending[index]
        except RequestError as error:
            self._finish(self._error_output(index, error, None))
            return
        store = self._pending.store
        row = int(store.line_of_request[self._pending.numbers[index]])
        url, body = store.line(row).url, store.body(row)
        num_tries = num_charged = 0
        while True:
            async with self._permit(index):
                if self._is_postponed and self._is_postponed.get(_model_of(body)):
                    break
                sent_s = self._clock.monotonic()
                verdict = await self._ask(client, url, body)
                now_s = self._clock.monotonic()
                if isinstance(verdict, Stop):
                    raise ExecutorError(f"{self._engine.address.base_url} answered {verdict.message}; {KEPT}")
                if isinstance(verdict, Answer):
                    self._pacer.answered(now_s)
                else:
                    is_alone = self._inflight.num_running == 1 and not self._inflight.num_waiting
                    num_charged += self._pacer.failed(index, verdict, sent_s, now_s, is_alone=is_alone)
                self._tell(verdict, now_s)
            if isinstance(verdict, Answer):
                if self._is_postponed:
                    self._is_postponed[_model_of(body)] = False
                self._take(self._output_of(index, verdict), verdict)
                return
            if self._pacer.is_too_long(verdict):
                self._postpone(_model_of(body), verdict)
                break
            if num_charged >= self._settings.retry.max_attempts:
                self._finish(self._failed_output(index, verdict, num_charged))
                return
            await self._clock.sleep(self._pacer.delay_s(num_tries, verdict))
            num_tries += 1
        self._num_postponed += 1
        self._make_room(index, 0)

    async def _ask(self, client: HttpClient, url: str, body: bytes) -> Answer | Failure | Stop:
        self._engine.stats.num_sent += 1
        try:
            return judge(await client.post(url, body), self._clock.wall(), url)
        except NoReplyError as error:
            return judge_silence(error)

    @asynccontextmanager
    async def _permit(self, index: int) -> AsyncIterator[None]:
        """Hold the right to be on the way to the server."""
        while (wait_s := self._pacer.wait_s(self._clock.monotonic())) != 0:
            if wait_s is None:
                async with self._changed:
                    await self._changed.wait()
            else:
                await self._clock.sleep(wait_s)
        self._pacer.begin(index)
        try:
            yield
        finally:
            self._pacer.end(index)
            async with self._changed:
                self._changed.notify_all()

    def _tell(self, verdict: Answer | Failure, now_s: float) -> None:
        """Keep the counters, and tell of an outage. Raises: ExecutorError when it has lasted too long."""
        stats, pacer = self._engine.stats, self._pacer
        stats.num_throttled, stats.num_failures = pacer.num_throttled, pacer.num_failures
        stats.max_inflight = self._inflight.max_running
        where, limit_s = self._engine.address.base_url, self._settings.retry.max_outage_s
        if isinstance(verdict, Failure) and pacer.is_given_up(now_s):
            raise ExecutorError(
                f"{where} has given no answer for {pacer.outage_s(now_s):.0f} s, the limit is {limit_s:.0f} s "
                f"(--max-outage); last: {verdict.message}; {KEPT}"
            )
        if pacer.is_down and not self._is_told and isinstance(verdict, Failure):
            self._engine.notify(f"{where} does not answer ({verdict.message}); trying for {limit_s:.0f} s")
        elif self._is_told and not pacer.is_down:
            self._engine.notify(f"{where} answers again")
        self._is_told = pacer.is_down

    def _postpone(self, model: str | None, failure: Failure) -> None:
        """Send no more requests for a model, whose quota it will be, until one that is on its way is answered."""
        self._last_postponed = failure
        if model not in self._is_postponed:
            where, whose = self._engine.address.base_url, "its model" if model is None else f"model {model!r}"
            self._engine.notify(
                f"{where} wants no requests for {whose} for {failure.retry_after_s:.0f} s ({failure.message}); they "
                "are left to a later run"
            )
        self._is_postponed[model] = True

    def _too_early(self, last: Failure) -> ExecutorError:
        return ExecutorError(
            f"{self._engine.address.base_url} asks for no requests for {last.retry_after_s:.0f} s, the limit is "
            f"{self._settings.retry.max_outage_s:.0f} s (--max-outage): {self._num_postponed} requests are left to a "
            f"later run; last: {last.message}; {KEPT}"
        )

    def _take(self, output: SequenceOutput, answer: Answer) -> None:
        """Finish a request. Refusals that a wrong address would give are held back until another answer shows that it
        is right: then they are rows. Raises: ExecutorError when too many say nothing else.
        """
        doubtful = self._doubtful
        if doubtful is None:
            self._finish(output)
        elif answer.is_doubtful:
            self._leave(output)
            doubtful.append(output)
            if len(doubtful) >= MAX_DOUBTS:
                raise self._wrong_address(doubtful)
        else:
            self._doubtful = None
            for held in doubtful:
                self._finished.put(held)
            self._finish(output)

    def _wrong_address(self, doubtful: list[SequenceOutput]) -> ExecutorError:
        response, where = doubtful[-1].response, self._engine.address.base_url
        assert response is not None
        return ExecutorError(
            f"{where} answered HTTP {response.status_code} ({words_of(response.body)}) to all of the first "
            f"{len(doubtful)} requests, as a wrong address does: check --base-url; no line is marked as failed"
        )

    def _finish(self, output: SequenceOutput) -> None:
        self._leave(output)
        self._finished.put(output)

    def _leave(self, output: SequenceOutput) -> None:
        self._tasks.pop(output.index, None)
        self._engine.stats.num_answered += 1
        self._make_room(output.index, output.num_output_tokens)

    def _make_room(self, index: int, num_output_tokens: int) -> None:
        """Let another request take the place of one."""
        self._inflight.finish(index, num_output_tokens, self._clock.monotonic())
        self._freed.set()

    def _output_of(self, index: int, answer: Answer) -> SequenceOutput:
        if answer.problem is not None or not answer.response.is_success:
            message = f"HTTP {answer.response.status_code}"
            return self._error_output(index, answer.problem or RequestError(message, code="refused"), answer.response)
        estimate = self._pending[index].num_prompt_tokens
        return SequenceOutput(
            index=index,
            token_ids=np.zeros(0, np.int32),
            finish_reason="stop",
            num_prompt_tokens=estimate if answer.num_prompt_tokens is None else answer.num_prompt_tokens,
            num_cached_tokens=answer.num_cached_tokens,
            response=answer.response,
        )

    def _failed_output(self, index: int, failure: Failure, num_attempts: int) -> SequenceOutput:
        message = f"{failure.message} (try {num_attempts} of {self._settings.retry.max_attempts})"
        error = RequestError(message, code=failure.code, status_code=0)
        return self._error_output(index, error, failure.response)

    def _error_output(self, index: int, error: RequestError, response: ServerResponse | None) -> SequenceOutput:
        return SequenceOutput(
            index=index,
            token_ids=np.zeros(0, np.int32),
            finish_reason="error",
            num_prompt_tokens=0,
            num_cached_tokens=0,
            error=error,
            response=response,
        )


def _model_of(body: bytes) -> str | None:
    """The model that a request names, if any."""
    model: str | None = json.loads(body).get("model")
    return model


def _first_of(error: BaseException) -> BaseException:
    """What ended a group of tasks: an error of ours where there is one."""
    while isinstance(error, BaseExceptionGroup):
        ours, others = error.split(BlendServeError)
        group = ours or others
        assert group is not None
        error = group.exceptions[0]
    return error

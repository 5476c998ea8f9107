"""Requests answered by vLLM in this process, in the planner's order, each until it has an end.

Two ways in: through the front door, where as many requests as may be are kept inside, or through the scheduler,
where vLLM asks the policy itself (`vllm_queue`). An engine that dies is opened again and what it had is run again; a
request under which engines keep dying ends as an error.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from blendserve.dialect.extras import Extras
from blendserve.engine.front import Front
from blendserve.engine.stats import RunStats
from blendserve.engines.vllm.ahead import Ahead
from blendserve.engines.vllm.api import VllmApi, VllmLimits, without_secrets
from blendserve.engines.vllm.cost import LoadTotals
from blendserve.engines.vllm.counters import VllmCounters
from blendserve.engines.vllm.entrance import EngineDiedError, Entrance
from blendserve.engines.vllm.inflight import StepLoad, VllmInflight
from blendserve.engines.vllm.queue import PolicyQueue, SchedulerState
from blendserve.engines.vllm.requests import GrammarOf, failed_output, output_of, was_aborted
from blendserve.errors import BlendServeError, ExecutorError, RequestError
from blendserve.job.pending import PendingRequests, withdrawn_error
from blendserve.planner.base import Policy
from blendserve.planner.plan import Plan
from blendserve.request import SequenceOutput

KEPT = "finished work is kept: run the same command again to go on"
MAX_DEATHS = 8
"""Engines that may die one after the other without a request answered between them."""
MAX_DEATHS_TOGETHER = 2
"""Deaths of engines under a request among others, after which it runs alone."""
MAX_DEATHS_ALONE = 2
"""Deaths under a request that ran alone, after which it is an error."""
LAG = 2
"""Requests beyond the running ones that keep an engine in a process of its own from waiting for us."""


@dataclass(slots=True)
class VllmDriver:
    """vLLM as the arguments of its `EngineArgs` have it. `adapters` are paths of LoRA adapters by name.

    `open` may be called ahead of `run`, which opens what is not open. `notify` is told, one line at a time, when an
    engine has died and another is opened.
    """

    api: VllmApi
    arguments: Mapping[str, Any]
    adapters: Mapping[str, str] = field(default_factory=dict)
    embeds: bool = False
    totals: LoadTotals | None = None
    grammar_of: GrammarOf | None = None
    notify: Callable[[str], None] = lambda _: None
    clock: Callable[[], float] = time.perf_counter
    counters: VllmCounters = field(default_factory=VllmCounters)
    stats: RunStats | None = None
    num_restarts: int = 0
    engine: Any | None = None

    def open(self) -> VllmLimits:
        """Load the model. Raises: ConfigError where vLLM takes the arguments for wrong, else ExecutorError."""
        try:
            if self.engine is None:
                self.engine = self.api.open_engine(self.arguments, self.counters)
            return VllmLimits.of(self.engine)
        except BlendServeError:
            raise
        except Exception as error:
            reason = without_secrets(str(error) or type(error).__name__, self.arguments)
            raise ExecutorError(
                f"vLLM cannot open this model: {reason}; what it wrote above may tell more: lower --kv-memory or "
                "--max-model-len, or change its settings with --vllm-arg"
            ) from error

    def close(self) -> None:
        """Free what the engine holds."""
        engine, self.engine = self.engine, None
        if engine is not None:
            self.api.close_engine(engine)

    def run(
        self, pending: PendingRequests, plan: Plan, policy: Policy, front: Front | None = None
    ) -> Iterator[SequenceOutput]:
        """Yield the end of every request as it comes; each ends once, however often engines die. Requests of `front` go
        ahead. Closing the iterator takes what runs out of the engine.

        Raises: ExecutorError when engines die one after the other.
        """
        return _Drive(self, pending, plan, policy, front).outputs()

    def answer(self, front: Front) -> None:
        """Answer the requests of a front while nothing else runs. Raises: ExecutorError."""
        self.open()
        entrance = Entrance(self)
        ahead, num_deaths = Ahead(front, entrance), 0
        try:
            while ahead.has_work:
                try:
                    ahead.enter()
                    if ahead.inside and ahead.hear(entrance.step()):
                        num_deaths = 0
                except EngineDiedError as death:
                    ahead.lost(death)
                    num_deaths += 1
                    if num_deaths > MAX_DEATHS:
                        raise ExecutorError(f"vLLM's engine died {num_deaths} times; last: {death}") from death
                    self.open_again(death)
        finally:
            ahead.leave()

    def open_again(self, death: EngineDiedError) -> None:
        """Open another engine in place of a dead one. Raises: ExecutorError."""
        self.notify(f"vLLM's engine died ({death}); opening another one")
        self.num_restarts += 1
        try:
            self.close()
        except Exception as error:  # noqa: BLE001  (what is dead may not close well)
            self.notify(f"the dead engine could not be closed: {error}")
        self.engine = None
        try:
            self.open()
        except Exception as error:
            raise ExecutorError(f"vLLM's engine died ({death}) and cannot be opened again: {error}; {KEPT}") from error
        self.counters.kv_use = 0.0


class _Drive:
    """One run: what is inside the engine, and what has to come in again after its death."""

    def __init__(
        self, engine: VllmDriver, pending: PendingRequests, plan: Plan, policy: Policy, front: Front | None
    ) -> None:
        self._engine = engine
        self._api = engine.api
        self._pending = pending
        self._plan = plan
        limits = engine.open()
        self._limits = limits
        self._entrance = Entrance(engine)
        self._ahead = None if front is None else Ahead(front, self._entrance)
        self._stats = engine.stats = RunStats(limits.capacity_tokens)
        self._num_preemptions_before = engine.counters.num_preemptions  # an engine may serve several runs
        self._num_hits_seen = engine.counters.num_hit_tokens
        self._inside: set[int] = set()
        self._again: deque[int] = deque()
        self._suspects: deque[int] = deque()
        self._deaths: Counter[int] = Counter()
        self._deaths_alone: Counter[int] = Counter()
        self._num_deaths_in_row = 0
        self._ended: list[SequenceOutput] = []
        is_near = self._api.scheduler_of(engine.engine) is not None
        self._inflight = VllmInflight(plan, policy, limits, limits.max_num_seqs + (0 if is_near else LAG))
        self._queue = self._bind(policy)

    def _bind(self, policy: Policy) -> PolicyQueue | None:
        """Have vLLM's scheduler follow the policy, where it is one of ours."""
        scheduler = self._api.scheduler_of(self._engine.engine)
        queue = getattr(scheduler, "waiting", None)
        if not isinstance(queue, PolicyQueue):
            return None
        state = SchedulerState(scheduler, self._limits.capacity_tokens, self._limits.block_size)
        queue.bind(policy, state, self._add)
        return queue

    def outputs(self) -> Iterator[SequenceOutput]:
        try:
            while self._ended or self._is_left():
                try:
                    self._turn()
                except EngineDiedError as death:
                    self._restart(death)
                ended, self._ended = self._ended, []
                yield from ended
        finally:
            self._abort()

    def _is_left(self) -> bool:
        is_ahead = self._ahead is not None and self._ahead.has_work
        return bool(self._inside) or is_ahead or self._inflight.num_left > 0

    @property
    def _has_inside(self) -> bool:
        return bool(self._inside) or (self._ahead is not None and bool(self._ahead.inside))

    def _turn(self) -> None:
        """Bring in what may come in, and run one step."""
        started = self._engine.clock()
        self._drop()
        if self._ahead is not None and not self._suspects:
            self._ahead.enter()
        if self._queue is None:
            self._fill()
        if not (self._has_inside or (self._queue is not None and self._inflight.num_waiting)):
            return
        before = self._engine.clock()
        finished = self._entrance.step()
        after = self._engine.clock()
        self._record(after - before)
        ended = [output for output in finished if output.finished and int(output.request_id) in self._inside]
        is_taken_down = False
        for output in ended:
            if was_aborted(output):
                is_taken_down = True
            else:
                self._finish(int(output.request_id), output)
        if self._ahead is not None:
            self._ahead.hear(finished)
        if is_taken_down:  # by a signal, say: nobody here aborts what runs
            raise EngineDiedError("it ended requests that were not finished")
        self._stats.add_scheduling(self._engine.clock() - after + before - started, has_step=True)

    def _drop(self) -> None:
        """Take out what nobody wants any more."""
        inside = [int(index) for index in self._pending.dropped() if int(index) in self._inside]
        self._entrance.abort(inside)
        for index in inside:
            self._stats.num_errors += 1
            self._end(failed_output(index, withdrawn_error()))

    def _fill(self) -> None:
        """Suspects run alone; then those that an engine took along; then whom the policy proposes."""
        if self._suspects:
            if not self._inside:
                self._add(self._suspects[0])
            return
        while self._again:
            self._add(self._again.popleft())
        for index in self._inflight.admit(self._engine.counters.kv_use):
            self._add(index)

    def _add(self, index: int) -> bool:
        """Hand a request to vLLM; False, and the end of it, where vLLM refuses it."""
        try:
            self._entrance.add(index, self._pending[index], self._extras(index))
        except RequestError as error:
            self._refuse(index, error)
            return False
        self._inside.add(index)
        self._stats.num_admissions += 1
        return True

    def _finish(self, index: int, output: Any) -> None:
        self._num_deaths_in_row = 0
        result = output_of(index, output, self._pending[index])
        if result.error is None:
            self._stats.num_finished += 1
            self._stats.num_admitted_tokens += result.num_prompt_tokens
            self._stats.num_cached_tokens += result.num_cached_tokens
            self._stats.num_prompt_tokens += result.num_prompt_tokens
            self._stats.num_output_tokens += result.num_output_tokens
        self._end(result)

    def _refuse(self, index: int, error: RequestError) -> None:
        self._stats.num_errors += 1
        if self._queue is not None:  # it tells the policy itself
            self._ended.append(failed_output(index, error))
        else:
            self._end(failed_output(index, error))

    def _end(self, result: SequenceOutput) -> None:
        index = result.index
        self._inside.discard(index)
        if self._suspects and self._suspects[0] == index:
            self._suspects.popleft()
        keeper = self._inflight if self._queue is None else self._queue
        keeper.finish(index, result.num_output_tokens)
        self._ended.append(result)

    def _extras(self, index: int) -> Extras:
        store = self._pending.store
        return Extras.from_bytes(store.body(int(store.line_of_request[self._pending.numbers[index]])))

    def _record(self, elapsed_s: float) -> None:
        counters, cost = self._engine.counters, self._plan.cost
        num_hits, self._num_hits_seen = counters.num_hit_tokens - self._num_hits_seen, counters.num_hit_tokens
        is_followed = self._queue is None and not self._suspects
        load = self._inflight.advance(num_hits) if is_followed else StepLoad(0, 0, 0.0, 0.0, 0)
        if self._engine.totals is not None and load.num_prefill_tokens + load.num_decode_tokens:
            self._engine.totals.add(load)
        num_preemptions = counters.num_preemptions - self._num_preemptions_before
        self._inflight.preempt(num_preemptions - self._stats.num_preemptions)
        self._stats.num_preemptions = num_preemptions
        self._stats.add_step(
            elapsed_s=elapsed_s,
            compute_s=cost.token_s * (load.num_prefill_tokens + load.num_decode_tokens),
            memory_s=cost.kv_token_s * load.num_kv_tokens,
            num_prefill_tokens=load.num_prefill_tokens,
            num_decode_tokens=load.num_decode_tokens,
            num_kv_tokens=round(counters.kv_use * self._limits.capacity_tokens),
            num_running=counters.num_running,
        )

    # After a death

    def _restart(self, death: EngineDiedError) -> None:
        """Open another engine; from here on everything goes through the front door. Raises: ExecutorError."""
        self._num_deaths_in_row += 1
        if self._ahead is not None:
            self._ahead.lost(death)
        if self._num_deaths_in_row > MAX_DEATHS:
            self._inside.clear()  # nothing can be taken out of what is dead
            raise ExecutorError(
                f"vLLM's engine died {self._num_deaths_in_row} times without an answer between, the limit is "
                f"{MAX_DEATHS}; last: {death}; {KEPT}"
            ) from death
        self._blame(death)
        self._engine.open_again(death)
        self._leave_queue()
        were_inside = self._inflight.start_over()
        self._inside.clear()
        self._again = deque(index for index in were_inside if index not in self._suspects)

    def _blame(self, death: EngineDiedError) -> None:
        """Count the death against those who were inside, and end the request that no engine survives."""
        if self._suspects and self._inside == {self._suspects[0]}:
            index = self._suspects[0]
            self._deaths_alone[index] += 1
            if self._deaths_alone[index] >= MAX_DEATHS_ALONE:
                message = f"vLLM's engine died each time it ran this request; the last reason: {death}"
                self._stats.num_errors += 1
                self._end(failed_output(index, RequestError(message, code="engine_failure", status_code=500)))
            return
        for index in sorted(self._inside):
            self._deaths[index] += 1
            if self._deaths[index] >= MAX_DEATHS_TOGETHER:
                self._suspects.append(index)

    def _leave_queue(self) -> None:
        """Take over what the policy has admitted through the scheduler that is gone."""
        if self._queue is not None:
            self._inflight.adopt(sorted(self._queue.admitted))
            self._queue = None

    def _abort(self) -> None:
        inside, self._inside = sorted(self._inside), set()
        self._entrance.abort(inside)
        if self._ahead is not None:
            self._ahead.leave()
        if self._queue is not None:
            self._queue.unbind()

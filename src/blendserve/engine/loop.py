"""The engine's loop, shared by real and simulated runs: decide (`Batcher`), execute (`Executor`), apply, yield."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Set
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from blendserve.config import EngineConfig
from blendserve.engine.batcher import Batcher, Schedule
from blendserve.engine.constrained import Constraints, Ends, GrammarTimes
from blendserve.engine.finish import GRAMMAR_STOPS, StopChecker, StopReason, stopped_rows
from blendserve.engine.keys import KeptKey
from blendserve.engine.sequence import NO_TOKENS, Int64s, Sequence
from blendserve.engine.stats import RunStats
from blendserve.engine.step import NO_PROMPT_RESULT, Executor, PromptResult, StepResult
from blendserve.errors import BlendServeError, CapacityError, RequestError
from blendserve.planner.base import Policy, Proposal, SchedulerView
from blendserve.request import Request, RequestSource, SequenceOutput, StructuredOutputs

if TYPE_CHECKING:
    import llguidance

Clock = Callable[[], float]


class EngineLoop:
    """Serves all requests of a source in the order of a policy, one step at a time.

    `run` is all that most callers need; a server or a test calls `begin`, then `step` while `has_work`, then `end`.
    A request that cannot run (its prompt exceeds the model or the memory) yields an error output and never ends the
    run; the policy sees it admitted and finished with 0 output tokens. `stats` is of the latest run.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        *,
        stop_checker: StopChecker | None = None,
        constraints: Constraints | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.batcher = Batcher(executor, config, has_stop_checker=stop_checker is not None)
        self.stats = RunStats(self.batcher.capacity_tokens)
        self._executor = executor
        self._stop_checker = stop_checker
        self._constraints = constraints
        self._grammar_times = GrammarTimes()
        self._clock = clock
        self._source: RequestSource = ()
        self._policy: Policy | None = None
        self._candidate: Sequence | None = None
        self._preempted: dict[int, Sequence] = {}
        self._outputs: list[SequenceOutput] = []

    def run(self, source: RequestSource, policy: Policy) -> Iterator[SequenceOutput]:
        """Yield the output of every request as it ends. Closing the iterator early gives all KV memory back; another
        run ends this one.

        Raises: ExecutorError when the executor fails, after yielding what had ended.
        """
        self.begin(source, policy)
        try:
            while self._policy is policy and self.has_work:
                yield from self.step()
        except BlendServeError:
            yield from self._take_outputs()
            raise
        finally:
            if self._policy is policy:
                self.end()

    def begin(self, source: RequestSource, policy: Policy) -> None:
        """Start a run with nothing admitted."""
        self.end()
        self.stats = RunStats(self.batcher.capacity_tokens)
        self.batcher.cache.next_use = lambda key: policy.next_use(key.key if isinstance(key, KeptKey) else key)
        if self._constraints is not None:
            self._grammar_times = GrammarTimes.of(self._constraints)
        self._source = source
        self._policy = policy

    @property
    def has_work(self) -> bool:
        """Do requests run or wait?"""
        return self.batcher.table.num_running > 0 or (self._policy is not None and self._policy.num_waiting > 0)

    def step(self) -> list[SequenceOutput]:
        """Admit, run one forward pass and return the outputs of the requests that ended.

        Raises: ExecutorError; outputs that were due are then returned by `run`, or lost with `end`.
        """
        assert self._policy is not None, "step before begin"
        started, executed_s = self._clock(), 0.0
        self._keep(self.batcher.grow(self._policy))
        if self.batcher.is_outgrown:
            self._fail_outgrown(self._policy)
        view = self._admit(self._policy)
        has_step = self.batcher.table.num_running > 0
        if has_step:
            budget = self._policy.begin_step(view, num_steps=1)
            schedule = self.batcher.plan(budget.num_prefill_tokens)
            schedule = self._with_masks(schedule)
            planned = self._clock()
            result = self._executor.execute(schedule.plan)
            executed_s = self._clock() - planned
            self._record(schedule, result)
            self._apply(schedule, result, self._policy)
        self.stats.add_scheduling(self._clock() - started - executed_s, has_step=has_step)
        return self._take_outputs()

    def preempt(self, row: int) -> None:
        """Take the KV memory of a running sequence, and of those that wait for what it computes; they wait again."""
        assert self._policy is not None, "preempt before begin"
        self._keep(self.batcher.preempt(row, self._policy))

    def end(self) -> None:
        """Give back every slot and block of the current run."""
        table = self.batcher.table
        if table.num_running:
            self.batcher.remove(list(range(table.num_running)))
        self.batcher.cache.clear()
        self._policy = None
        self._source = ()
        self._candidate = None
        self._preempted.clear()
        self._outputs.clear()

    def close(self) -> None:
        """End the current run and close the executor."""
        self.end()
        if self._constraints is not None:
            self._constraints.close()
        self._executor.close()

    def __enter__(self) -> EngineLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> None:
        """Assert the invariants of every part. For tests: slow."""
        self.batcher.check()
        running = set(self.batcher.table.request_index.tolist())
        assert not running & self._preempted.keys(), "a request runs and waits"

    # Admission

    def _admit(self, policy: Policy) -> SchedulerView:
        """Admit what the policy proposes and the memory holds; returns what runs then."""
        batcher = self.batcher
        view = batcher.view()
        while not batcher.table.is_full and (proposal := policy.next(view)) is not None:
            sequence = self._sequence_of(proposal, policy)
            if sequence is None:
                continue
            if not batcher.try_admit(sequence):
                assert batcher.table.num_running, "a request that fits the pool was refused by an idle engine"
                return view
            num_cached = int(batcher.table.num_cached_tokens[-1])
            self.stats.num_admissions += 1
            self.stats.num_admitted_tokens += sequence.num_tokens
            self.stats.num_cached_tokens += num_cached
            self._preempted.pop(proposal.index, None)
            self._candidate = None
            policy.admitted(proposal, num_cached)
            view = batcher.view()
        if not batcher.table.num_running and policy.num_waiting:
            raise RuntimeError(
                f"policy {policy.name} proposes nothing to an idle engine while {policy.num_waiting} requests wait"
            )
        return view

    def _keep(self, preempted: list[Sequence]) -> None:
        self.stats.num_preemptions += len(preempted)
        for sequence in preempted:
            self._preempted[sequence.request.index] = sequence

    def _sequence_of(self, proposal: Proposal, policy: Policy) -> Sequence | None:
        """The sequence of a proposed request; None where it can never run, which is then one of the outputs."""
        index = proposal.index
        if index in self._preempted:
            sequence = self._preempted[index]
            if sequence.num_tokens <= self.batcher.capacity_tokens:
                return sequence
            del self._preempted[index]
            policy.admitted(proposal, 0)
            self._refuse(index, self._outgrown(sequence.request, sequence.num_tokens), policy)
            return None
        if self._candidate is None or self._candidate.request.index != index:
            try:
                self._candidate = self._new_sequence(self._source[index])
            except (RequestError, CapacityError) as error:
                policy.admitted(proposal, 0)
                self._refuse(index, error, policy)
                return None
        return self._candidate

    def _new_sequence(self, request: Request) -> Sequence:
        """Raises: RequestError or CapacityError for a request that can never run here."""
        batcher = self.batcher
        room = batcher.max_model_len - request.num_prompt_tokens
        if request.num_prompt_tokens < 1:
            raise RequestError("the prompt has no tokens; it needs at least 1", code="empty_prompt", param="prompt")
        if room < min(1, request.max_output_tokens):
            raise RequestError(
                f"the prompt has {request.num_prompt_tokens} tokens, which leaves no room for output within the "
                f"context length of {batcher.max_model_len}; shorten the prompt or raise --max-model-len",
                code="context_length_exceeded",
                param="messages",
            )
        if request.num_prompt_tokens > batcher.capacity_tokens:
            raise self._outgrown(request, request.num_prompt_tokens)
        keys = self._keys_of(request) if batcher.has_prefix_caching else ()
        sequence = Sequence(request, min(request.max_output_tokens, room), keys)
        if request.sampling.structured_outputs is not None and batcher.needs_tokens:
            sequence.matcher = self._start_grammar(request.sampling.structured_outputs)
        return sequence

    def _start_grammar(self, structure: StructuredOutputs) -> llguidance.LLMatcher:
        if self._constraints is None:
            raise RequestError(
                "this engine cannot follow a grammar; remove what shapes the answer, or choose another engine",
                code="unsupported_parameter",
                param="structured_outputs",
            )
        try:
            matcher = self._constraints.start(structure)
        finally:
            self._count_grammars(self._constraints)
        self.stats.num_constrained += 1
        return matcher

    def _count_grammars(self, constraints: Constraints) -> None:
        """What grammars took since the run began."""
        before, stats = self._grammar_times, self.stats
        now = GrammarTimes.of(constraints)
        stats.num_grammars = now.num_grammars - before.num_grammars
        stats.grammar_compile_s = now.compile_s - before.compile_s
        stats.grammar_mask_s = now.mask_s - before.mask_s
        stats.grammar_wait_s = now.wait_s - before.wait_s

    def _keys_of(self, request: Request) -> tuple[Hashable, ...]:
        kept = self._executor.kept_with(request)
        return tuple(request.block_keys) if kept is None else tuple(KeptKey(kept, key) for key in request.block_keys)

    def _outgrown(self, request: Request, num_tokens: int) -> CapacityError:
        """What a request comes to that needs more KV memory than there is: found when it does, not when it might."""
        return CapacityError(
            f"the request needs KV memory for {num_tokens} tokens ({request.num_prompt_tokens} of them its prompt), "
            f"but there is room for {self.batcher.capacity_tokens}; raise --kv-memory, or lower max_tokens"
        )

    def _fail_outgrown(self, policy: Policy) -> None:
        sequence = self.batcher.table.sequence(0)
        num_tokens = int(self.batcher.table.num_computed_tokens[0]) + 1
        self.batcher.remove([0])
        self._refuse(sequence.request.index, self._outgrown(sequence.request, num_tokens), policy)

    def _refuse(self, index: int, error: Exception, policy: Policy) -> None:
        policy.finished(index, 0)
        self.stats.num_errors += 1
        self._outputs.append(SequenceOutput(index, NO_TOKENS, "error", 0, 0, error=error))

    def _with_masks(self, schedule: Schedule) -> Schedule:
        """Begin to fill the masks of this step, where anybody follows a grammar."""
        if self._constraints is None or not (self.batcher.table.stop_rules & GRAMMAR_STOPS).any():
            return schedule
        masks = self._constraints.masks(self.batcher.table, schedule.rows[schedule.plan.is_sampled])
        return schedule if masks is None else schedule._replace(plan=replace(schedule.plan, masks=masks))

    # What came of a step

    def _record(self, schedule: Schedule, result: StepResult) -> None:
        batcher = self.batcher
        self.stats.add_step(
            elapsed_s=result.elapsed_s,
            compute_s=result.compute_s,
            memory_s=result.memory_s,
            num_prefill_tokens=schedule.plan.num_prefill_tokens,
            num_decode_tokens=schedule.plan.num_decode_tokens,
            num_kv_tokens=batcher.capacity_tokens - batcher.free_tokens,
            num_running=batcher.table.num_running,
        )

    def _apply(self, schedule: Schedule, result: StepResult, policy: Policy) -> None:
        batcher, table = self.batcher, self.batcher.table
        sampled = batcher.apply(schedule, result.token_ids)
        for position, logprob in result.logprobs.items():
            table.sequence(int(sampled[position])).logprobs.append(logprob)
        stopped: dict[int, StopReason] = {}
        if batcher.needs_tokens:
            stopped = stopped_rows(table, sampled, result.token_ids, self._executor.eos_token_ids, self._stop_checker)
        ends: Ends = {}
        if schedule.plan.masks is not None and self._constraints is not None:
            ends = self._constraints.follow(table, sampled, result.token_ids)
            self._count_grammars(self._constraints)
        finished = self._finished_rows(stopped.keys() | ends.keys())
        for row in finished:
            error = ends.get(row)
            if error is not None:
                self._refuse(table.sequence(row).request.index, error, policy)
            else:
                self._finish(row, stopped, policy, is_complete=row in ends)
        if finished:
            batcher.remove(finished)

    def _finished_rows(self, stopped: Set[int]) -> list[int]:
        table = self.batcher.table
        is_finished = (table.num_output_tokens >= table.max_output_tokens) & (table.is_prefilling == 0)
        rows: Int64s = is_finished.nonzero()[0]
        return sorted({*rows.tolist(), *stopped}) if stopped else rows.tolist()

    def _finish(self, row: int, stopped: dict[int, StopReason], policy: Policy, *, is_complete: bool) -> None:
        """`is_complete`: its grammar allows nothing more, with or without a token that says so."""
        table = self.batcher.table
        sequence = table.sequence(row)
        request = sequence.request
        token_ids = table.output_token_ids(row)
        self.stats.num_finished += 1
        self.stats.num_prompt_tokens += request.num_prompt_tokens
        self.stats.num_output_tokens += len(token_ids)
        policy.finished(request.index, len(token_ids))
        asked = self._prompt_result(sequence)
        self._outputs.append(
            SequenceOutput(
                index=request.index,
                token_ids=token_ids.copy() if self.batcher.needs_tokens else token_ids,
                finish_reason="stop" if row in stopped or is_complete else "length",
                num_prompt_tokens=request.num_prompt_tokens,
                num_cached_tokens=sequence.num_cached_tokens,
                logprobs=tuple(sequence.logprobs),
                stop_reason=stopped.get(row),
                prompt_logprobs=asked.logprobs,
                embedding=asked.embedding,
                has_stop_token=row in stopped or (is_complete and int(token_ids[-1]) in self._executor.eos_token_ids),
            )
        )

    def _prompt_result(self, sequence: Sequence) -> PromptResult:
        request = sequence.request
        if request.embedding is None and request.sampling.prompt_logprobs is None:
            return NO_PROMPT_RESULT
        return self._executor.prompt_result(sequence.slot, self.batcher.table.block_tables[sequence.slot])

    def _take_outputs(self) -> list[SequenceOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

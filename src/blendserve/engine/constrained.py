"""The sequences of a run that follow a grammar: masks of what they may say next, and where a grammar ends them.

Most tokens that a model prefers are ones that its grammar allows, and asking about one token takes a tenth of the time
of a mask. So a greedy sequence chooses freely first, and is given a mask only where its grammar refuses the choice:
the largest of all logits is the largest of those that a mask leaves, if the mask leaves it. Sequences that draw need a
mask to draw under. These are filled on a thread of their own while the forward pass runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from blendserve.dialect.grammars import param_of, refusal_of
from blendserve.engine.finish import GRAMMAR_STOPS
from blendserve.engine.grammar import GrammarCompiler, is_dead_end
from blendserve.engine.sequence import Int32s, Int64s, SequenceTable
from blendserve.engine.step import Refused, StepMasks
from blendserve.errors import RequestError
from blendserve.request import SamplingParams, StructuredOutputs

if TYPE_CHECKING:
    import llguidance

MASK_BITS = 32
"""Tokens of one word of a mask."""
STEP_THREADS_PER_MASK_THREAD = 4
"""Masks have a whole forward pass to be ready. On two cores, 64 sequences cost a step 3.8% with one thread beside the
two of the pass, and 5 to 13% with two: they take the place of threads that everybody waits for."""
Ends = dict[int, RequestError | None]


class Constraints(Protocol):
    """What the engine's loop asks of grammars. Times are those since it was made, in seconds."""

    @property
    def num_grammars(self) -> int: ...
    @property
    def compile_s(self) -> float: ...
    @property
    def mask_s(self) -> float: ...
    @property
    def wait_s(self) -> float: ...

    def start(self, structure: StructuredOutputs) -> llguidance.LLMatcher:
        """A matcher for one sequence. Raises: RequestError where the structure cannot be followed."""

    def masks(self, table: SequenceTable, rows: Int64s) -> StepMasks | None:
        """Begin to fill the masks of `rows`, which are sampled in this step; None where none of them has a grammar."""

    def follow(self, table: SequenceTable, rows: Int64s, token_ids: Int32s) -> Ends:
        """Tell the grammars of `rows` what was sampled. Returns: rows that end, some with an error."""

    def close(self) -> None: ...


class GrammarTimes(NamedTuple):
    """What grammars took: see `Constraints`."""

    num_grammars: int = 0
    compile_s: float = 0.0
    mask_s: float = 0.0
    wait_s: float = 0.0

    @classmethod
    def of(cls, constraints: Constraints) -> GrammarTimes:
        return cls(constraints.num_grammars, constraints.compile_s, constraints.mask_s, constraints.wait_s)


class GrammarConstraints:
    """Masks from llguidance, for at most `max_num_seqs` sequences of a step on `num_threads` threads.

    Mutates: one array of masks, which is filled again for every step, and the matchers of sequences. `mask_s` adds up
    the time in which masks were filled; `wait_s` is what sampling waited for masks, and for looks at chosen tokens.
    """

    def __init__(self, compiler: GrammarCompiler, max_num_seqs: int, num_threads: int) -> None:
        self._mask_s = self._wait_s = 0.0
        self._compiler = compiler
        self._num_threads = max(1, num_threads // STEP_THREADS_PER_MASK_THREAD)
        self._words = np.zeros((max_num_seqs, -(-compiler.vocab_size // MASK_BITS)), np.int32)
        self._end_words = np.zeros(self._words.shape[1], np.int32)
        for token_id in compiler.eos_token_ids:
            self._end_words.view(np.uint32)[token_id // MASK_BITS] |= np.uint32(1 << token_id % MASK_BITS)
        self._threads: tuple[llguidance.LLExecutor, ThreadPoolExecutor] | None = None

    @property
    def num_grammars(self) -> int:
        return self._compiler.stats.num_grammars

    @property
    def compile_s(self) -> float:
        return self._compiler.stats.compile_s

    @property
    def mask_s(self) -> float:
        return self._mask_s

    @property
    def wait_s(self) -> float:
        return self._wait_s

    def start(self, structure: StructuredOutputs) -> llguidance.LLMatcher:
        return self._compiler.start(structure)

    def masks(self, table: SequenceTable, rows: Int64s) -> StepMasks | None:
        positions = _constrained(table, rows).tolist()
        if not positions:
            return None
        early: list[_Asked] = []
        late: list[_Asked] = []
        row_of = np.full(len(rows), -1, np.int32)
        for position, row in zip(positions, rows[positions].tolist(), strict=True):
            sequence = table.sequence(row)
            assert sequence.matcher is not None
            asked = _Asked(position, sequence.matcher, sequence.request.sampling.ignore_eos)
            if chooses_freely(sequence.request.sampling):
                late.append(asked)
            else:
                row_of[position] = len(early)
                early.append(asked)
        words = self._fill_beside(early)
        return StepMasks(row_of, words, self._refused_by(late, self._words[len(early) :]) if late else None)

    def _fill_beside(self, asked: Sequence[_Asked]) -> Callable[[], Int32s]:
        """Begin to fill masks on another thread; returns what waits for them."""
        if not asked:
            return lambda: self._words[:0]
        executor, pool = self._started()
        filled = pool.submit(self._fill, executor, asked)
        return lambda: self._wait(filled)

    def _fill(self, executor: llguidance.LLExecutor, asked: Sequence[_Asked]) -> Int32s:
        started = time.perf_counter()
        words = self._words[: len(asked)]
        pairs = [(entry.matcher, at) for at, entry in enumerate(asked)]
        executor.unsafe_compute_mask_ptr(pairs, words.ctypes.data, words.shape[1] * words.itemsize, len(words))
        for at, entry in enumerate(asked):
            if entry.is_endless and (without_end := words[at] & ~self._end_words).any():
                words[at] = without_end
        self._mask_s += time.perf_counter() - started
        return words

    def _refused_by(self, asked: Sequence[_Asked], words: Int32s) -> Refused:
        """Looks at what `asked` chose; fills masks into `words` for those whose grammar refuses it."""
        matchers = {entry.position: entry.matcher for entry in asked}

        def refused(first: int, token_ids: Int32s) -> tuple[Int32s, Int32s] | None:
            started = time.perf_counter()
            row_of = np.full(len(token_ids), -1, np.int32)
            num_refused = 0
            for at, token_id in enumerate(token_ids.tolist()):
                matcher = matchers.get(first + at)
                if matcher is not None and not allows(matcher, token_id):
                    row_of[at] = num_refused
                    self._fill_now(matcher, words[num_refused])
                    num_refused += 1
            self._wait_s += time.perf_counter() - started
            return (row_of, words[:num_refused]) if num_refused else None

        return refused

    def _fill_now(self, matcher: llguidance.LLMatcher, words: Int32s) -> None:
        started = time.perf_counter()
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._mask_s += time.perf_counter() - started

    def _wait(self, filled: Future[Int32s]) -> Int32s:
        started = time.perf_counter()
        words = filled.result()
        self._wait_s += time.perf_counter() - started
        return words

    def _started(self) -> tuple[llguidance.LLExecutor, ThreadPoolExecutor]:
        if self._threads is None:
            from llguidance import LLExecutor

            self._threads = LLExecutor(self._num_threads), ThreadPoolExecutor(1, "grammar-masks")
        return self._threads

    def follow(self, table: SequenceTable, rows: Int64s, token_ids: Int32s) -> Ends:
        ends: Ends = {}
        positions = _constrained(table, rows)
        for row, token_id in zip(rows[positions].tolist(), token_ids[positions].tolist(), strict=True):
            sequence = table.sequence(row)
            matcher, structure = sequence.matcher, sequence.request.sampling.structured_outputs
            assert matcher is not None
            assert structure is not None
            if not matcher.consume_token(token_id) or matcher.is_error():
                ends[row] = _lost(structure, matcher.get_error())
            elif matcher.is_stopped():
                ends[row] = None
        return ends

    def close(self) -> None:
        """Stop the thread once it has filled what it fills."""
        if self._threads is not None:
            self._threads[1].shutdown()
            self._threads = None


class _Asked(NamedTuple):
    """An entry of a step that follows a grammar. `is_endless`: no token may end it where another may come."""

    position: int
    matcher: llguidance.LLMatcher
    is_endless: bool


def chooses_freely(sampling: SamplingParams) -> bool:
    """Does a mask change nothing for a token that it allows?"""
    return (
        sampling.temperature == 0.0
        and sampling.logprobs is None
        and sampling.allowed_token_ids is None
        and not sampling.ignore_eos
    )


def allows(matcher: llguidance.LLMatcher, token_id: int) -> bool:
    """Does the mask that a matcher would fill have a token?"""
    if not matcher.validate_tokens([token_id]):
        return False
    forced = matcher.compute_ff_tokens()  # where one text may follow alone, its mask has just the first token of that
    return not forced or forced[0] == token_id


def _constrained(table: SequenceTable, rows: Int64s) -> Int64s:
    positions: Int64s = np.flatnonzero(table.stop_rules[rows] & GRAMMAR_STOPS)
    return positions


def _lost(structure: StructuredOutputs, error: str) -> RequestError:
    if is_dead_end(error):
        return refusal_of(structure, "nothing fits any more in the middle of an answer")
    return RequestError(
        f"the grammar took more work than is allowed in the middle of an answer: {' '.join(error.split())[:300]}; "
        "make it simpler",
        code="grammar_too_complex",
        param=param_of(structure),
    )

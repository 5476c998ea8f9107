"""The sequences of a run that follow a grammar: masks of what they may say next, and where a grammar ends them.

Masks of a step are filled on threads of their own while its forward pass runs; only sampling waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from blendserve.dialect.grammars import param_of
from blendserve.engine.finish import GRAMMAR_STOPS
from blendserve.engine.grammar import GrammarCompiler
from blendserve.engine.sequence import Int32s, Int64s, SequenceTable
from blendserve.engine.step import StepMasks
from blendserve.errors import RequestError
from blendserve.request import StructuredOutputs

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
    the time in which masks were filled, beside forward passes; `wait_s` is what sampling waited for them.
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
        positions = _constrained(table, rows)
        if not len(positions):
            return None
        sequences = [table.sequence(row) for row in rows[positions].tolist()]
        matchers = [sequence.matcher for sequence in sequences]
        endless = [at for at, sequence in enumerate(sequences) if sequence.request.sampling.ignore_eos]
        row_of = np.full(len(rows), -1, np.int32)
        row_of[positions] = np.arange(len(positions))
        executor, pool = self._started()
        filled = pool.submit(self._fill, executor, matchers, endless)
        return StepMasks(row_of, lambda: self._wait(filled))

    def _fill(
        self, executor: llguidance.LLExecutor, matchers: Sequence[llguidance.LLMatcher | None], endless: Sequence[int]
    ) -> Int32s:
        started = time.perf_counter()
        words = self._words[: len(matchers)]
        pairs = [(matcher, at) for at, matcher in enumerate(matchers) if matcher is not None]
        executor.unsafe_compute_mask_ptr(pairs, words.ctypes.data, words.shape[1] * words.itemsize, len(words))
        for at in endless:
            without_end = words[at] & ~self._end_words
            if without_end.any():
                words[at] = without_end
        self._mask_s += time.perf_counter() - started
        return words

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
            if not matcher.consume_token(token_id):
                ends[row] = _lost(structure, matcher.get_error())
            elif matcher.is_stopped():
                ends[row] = None
        return ends

    def close(self) -> None:
        """Stop the thread once it has filled what it fills."""
        if self._threads is not None:
            self._threads[1].shutdown()
            self._threads = None


def _constrained(table: SequenceTable, rows: Int64s) -> Int64s:
    positions: Int64s = np.flatnonzero(table.stop_rules[rows] & GRAMMAR_STOPS)
    return positions


def _lost(structure: StructuredOutputs, reason: str) -> RequestError:
    return RequestError(
        f"the grammar took more work than is allowed in the middle of an answer: {' '.join(reason.split())[:300]}; "
        "make it simpler",
        code="grammar_too_complex",
        param=param_of(structure),
    )

"""One forward pass as two frozen values: what to run (`StepPlan`) and what came of it (`StepResult`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from blendserve.request import Request, TokenLogprob

Int32s = NDArray[np.int32]


Refused = Callable[[int, Int32s], tuple[Int32s, Int32s] | None]
"""Asked about sampled tokens of entries that follow each other, from the given one on: masks of those that must be
sampled again, as `StepMasks.row_of` and its words, borrowed until the next question. None: all may stay."""


@dataclass(frozen=True, slots=True)
class StepMasks:
    """Which tokens may come next, for the entries that are sampled.

    `words` waits until the masks are filled, and returns them: int32[any, ceil(vocab_size / 32)], one bit for each
    token, lowest first. Shapes: `row_of` int32[number of sampled entries], the mask of every entry, -1 where any token
    may come. The masks are borrowed until the next step. `refused` looks at what was sampled without a mask; what it
    refuses never depends on anything but the entry's own sequence.
    """

    row_of: Int32s
    words: Callable[[], Int32s]
    refused: Refused | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Which tokens of which sequences run in this step. One entry per scheduled sequence, n entries.

    Shapes: `slots`, `num_scheduled_tokens`, `num_computed_tokens` int32[n]; `is_sampled` bool[n]: the last scheduled
    token of that entry yields a new token; `token_ids` int32[max_num_seqs, max_model_len] and `block_tables`
    int32[max_num_seqs, blocks of the longest so far] are the sequence table's own arrays, indexed by slot, borrowed
    until the step has been applied (`token_ids` is empty where the executor asks for no tokens). Entry i computes
    positions [num_computed_tokens[i], num_computed_tokens[i] + num_scheduled_tokens[i]) of row slots[i]. Prefill
    entries may read blocks that an earlier entry of the same step computes; executors write the KV of a layer before
    attention reads it. `masks` are those of grammars, None where no entry has one.
    """

    slots: Int32s
    num_scheduled_tokens: Int32s
    num_computed_tokens: Int32s
    is_sampled: NDArray[np.bool_]
    token_ids: Int32s
    block_tables: Int32s
    num_prefill_tokens: int
    num_decode_tokens: int
    masks: StepMasks | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced.

    Shapes: `token_ids` int32[number of sampled entries], in the order of the plan. `logprobs` maps a position in
    `token_ids` to its log probabilities, for sequences that asked. Units: `elapsed_s` is wall clock for real
    executors and virtual time for the simulated one. `compute_s` and `memory_s` are the step's two resource times where
    the executor knows them: modelled by the simulated one; the work done, at the machine's peak rates, on the native
    one; else 0.
    """

    token_ids: Int32s
    elapsed_s: float
    logprobs: dict[int, TokenLogprob]
    compute_s: float = 0.0
    memory_s: float = 0.0


class PromptResult(NamedTuple):
    """What a request asked of its prompt: as in `SequenceOutput`."""

    logprobs: tuple[TokenLogprob | None, ...] | None = None
    embedding: NDArray[np.float32] | None = None


NO_PROMPT_RESULT = PromptResult()


class Executor(Protocol):
    """Runs steps. Sampling parameters reach it once per sequence, through `admit`.

    `num_blocks` KV blocks of `block_size` tokens exist; `needs_tokens` is False for executors that never look at token
    values (the simulated one). `eos_token_ids` end a sequence unless its request ignores them.

    What a request asks of its prompt is kept with its blocks: `kept_with` names it, None for KV alone, and only
    requests with the same name share blocks. `prompt_result` is what was kept, once the whole prompt has been computed
    into `blocks`, the slot's row of the block tables.
    Raises: ExecutorError when a step cannot run.
    """

    num_blocks: int
    block_size: int
    needs_tokens: bool
    eos_token_ids: tuple[int, ...]

    def admit(self, slot: int, request: Request) -> None: ...
    def release(self, slot: int) -> None: ...
    def kept_with(self, request: Request) -> Hashable | None: ...
    def prompt_result(self, slot: int, blocks: Int32s) -> PromptResult: ...
    def execute(self, plan: StepPlan) -> StepResult: ...
    def close(self) -> None: ...

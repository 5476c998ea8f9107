"""Grammars in tests: tiny tokenizers of every kind, and a slow twin that tries every token of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tiny_files import byte_level_tokenizer
from tiny_models import random_tokens, random_weights, tiny_spec

from blendserve.config import EngineConfig
from blendserve.engine.constrained import Constraints, Ends, GrammarConstraints
from blendserve.engine.finish import GRAMMAR_STOPS
from blendserve.engine.grammar import GrammarCompiler
from blendserve.engine.loop import EngineLoop
from blendserve.engine.sequence import Int32s, Int64s, SequenceTable
from blendserve.engine.step import Executor, StepMasks
from blendserve.executors.native import NativeExecutor
from blendserve.executors.reference import ReferenceExecutor, ReferenceModel
from blendserve.models.detokenize import StopChecker, text_of
from blendserve.models.tokenizer import Tokenizer
from blendserve.request import Request, SamplingParams, SequenceOutput, StructuredOutputs

if TYPE_CHECKING:
    import llguidance

SPEC = tiny_spec()
EOS = SPEC.eos_token_ids
TOKENIZER = Tokenizer(byte_level_tokenizer(SPEC.vocab_size), EOS)


def compiler(tokenizer: Tokenizer = TOKENIZER, vocab_size: int = SPEC.vocab_size) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size, tokenizer.eos_token_ids)


class ByTrying:
    """Masks by asking a matcher for every token on its own whether it may come: no bit masks, no threads."""

    num_grammars, compile_s, mask_s, wait_s = 0, 0.0, 0.0, 0.0

    def __init__(self) -> None:
        self._compiler = compiler()

    def start(self, structure: StructuredOutputs) -> llguidance.LLMatcher:
        return self._compiler.start(structure)

    def masks(self, table: SequenceTable, rows: Int64s) -> StepMasks | None:
        words = np.zeros((len(rows), SPEC.vocab_size // 32), np.int32)
        row_of = np.full(len(rows), -1, np.int32)
        for at, row in enumerate(rows.tolist()):
            sequence = table.sequence(row)
            if sequence.matcher is None:
                continue
            row_of[at] = at
            allowed = [token for token in range(SPEC.vocab_size) if sequence.matcher.validate_tokens([token])]
            if forced := sequence.matcher.compute_ff_tokens():  # one text may follow alone: as the tokenizer writes it
                assert forced[0] in allowed
                allowed = forced[:1]
            if sequence.request.sampling.ignore_eos:
                allowed = [token for token in allowed if token not in EOS] or allowed
            for token in allowed:
                words[at].view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
        return StepMasks(row_of, lambda: words) if (row_of >= 0).any() else None

    def follow(self, table: SequenceTable, rows: Int64s, token_ids: Int32s) -> Ends:
        ends: Ends = {}
        for row, token in zip(rows.tolist(), token_ids.tolist(), strict=True):
            matcher = table.sequence(row).matcher
            if table.stop_rules[row] & GRAMMAR_STOPS and matcher is not None:
                assert matcher.consume_token(token), matcher.get_error()
                if matcher.is_stopped():
                    ends[row] = None
        return ends

    def close(self) -> None:
        pass


def request(index: int, structure: StructuredOutputs | None, max_tokens: int = 60, **sampling: object) -> Request:
    """A prompt of its own for every index."""
    prompt = random_tokens(SPEC, 12 + index % 9, seed=index)
    params = SamplingParams(max_tokens=max_tokens, structured_outputs=structure, **sampling)  # type: ignore[arg-type]
    return Request(index, prompt, len(prompt), params, max_tokens, seed=index)


def native_executor(
    *,
    num_threads: int = 2,
    num_blocks: int = 256,
    overlap: str = "off",
    isa: str = "portable",
    max_num_seqs: int = 16,
) -> NativeExecutor:
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(64, 4 * max_num_seqs),
        max_model_len=256,
        num_threads=num_threads,
        overlap=overlap,
    )
    return NativeExecutor(SPEC, random_weights(SPEC), config, num_blocks=num_blocks, isa=isa)


def reference_executor() -> ReferenceExecutor:
    return ReferenceExecutor(ReferenceModel(SPEC, random_weights(SPEC), "bf16"), num_blocks=256)


def make_loop(
    executor: Executor, constraints: Constraints | None = None, *, max_num_seqs: int = 16, max_tokens: int = 64
) -> EngineLoop:
    config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_tokens, max_model_len=256)
    constraints = constraints or GrammarConstraints(compiler(), max_num_seqs, num_threads=2)
    return EngineLoop(executor, config, stop_checker=StopChecker(TOKENIZER), constraints=constraints)


def outputs_by_index(outputs: Iterable[SequenceOutput]) -> list[SequenceOutput]:
    return sorted(outputs, key=lambda output: output.index)


def tokens_of(outputs: Sequence[SequenceOutput]) -> list[tuple[str, list[int]]]:
    return [(output.finish_reason, output.token_ids.tolist()) for output in outputs]


def text(output: SequenceOutput, tokenizer: Tokenizer = TOKENIZER) -> str:
    return text_of(
        tokenizer,
        output.token_ids,
        output.finish_reason,
        output.stop_reason,
        SamplingParams(),
        has_stop_token=output.has_stop_token,
    )

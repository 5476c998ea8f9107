"""Greedy sequences choose freely, and are given a mask where their grammar refuses the choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from grammar_cases import (
    SPEC,
    TOKENIZER,
    ByTrying,
    compiler,
    make_loop,
    native_executor,
    outputs_by_index,
    reference_executor,
    request,
    tokens_of,
)
from test_constrained import STRUCTURES

from blendserve.engine.constrained import GrammarConstraints, allows, chooses_freely
from blendserve.engine.fake import FifoPolicy
from blendserve.engine.loop import EngineLoop
from blendserve.engine.sequence import Int32s
from blendserve.request import Request, SamplingParams, SequenceOutput, StructuredOutputs

PARAMS: tuple[dict[str, Any], ...] = (
    {},
    {"logit_bias": {5: 20.0, 7: -20.0}},
    {"repetition_penalty": 1.6},
    {"frequency_penalty": 1.5, "presence_penalty": 0.7},
    {"min_tokens": 12, "logit_bias": {TOKENIZER.eos_token_ids[0]: 30.0}},
    {"stop_token_ids": (9,)},
)


def requests(count: int) -> list[Request]:
    return [
        request(i, STRUCTURES[i % len(STRUCTURES)], temperature=0.0, **PARAMS[i // len(STRUCTURES) % len(PARAMS)])
        for i in range(count)
    ]


def run(loop: EngineLoop, given: list[Request]) -> list[SequenceOutput]:
    with loop:
        return outputs_by_index(loop.run(given, FifoPolicy(len(given))))


class Counting(GrammarConstraints):
    num_late = 0

    def _fill_now(self, matcher: Any, words: Int32s) -> None:
        self.num_late += 1
        super()._fill_now(matcher, words)


def test_free_choices_agree_with_masks_for_all() -> None:
    given = requests(42)
    constraints = Counting(compiler(), 16, 2)
    found = run(make_loop(native_executor(), constraints), given)
    assert tokens_of(found) == tokens_of(run(make_loop(native_executor(), ByTrying()), given))
    num_tokens = sum(len(output.token_ids) for output in found if given[output.index].sampling.structured_outputs)
    assert 0 < constraints.num_late < num_tokens


def test_the_reference_asks_too() -> None:
    given = requests(14)
    asked = run(make_loop(reference_executor()), given)
    assert tokens_of(asked) == tokens_of(run(make_loop(reference_executor(), ByTrying()), given))


def test_more_sequences_than_the_head_multiplies_at_once() -> None:
    given = requests(112)
    executor = native_executor(max_num_seqs=112, num_blocks=1024)
    loop = make_loop(executor, GrammarConstraints(compiler(), 112, 2), max_num_seqs=112, max_tokens=448)
    with loop:
        found = outputs_by_index(loop.run(given, FifoPolicy(len(given))))
        assert max(loop.stats.steps.columns()["num_running"]) > 96
    assert tokens_of(found) == tokens_of(run(make_loop(native_executor()), given))


@pytest.mark.parametrize("structure", [structure for structure in STRUCTURES if structure])
def test_what_is_allowed_is_what_a_mask_has(structure: StructuredOutputs) -> None:
    random = np.random.default_rng(3)
    matcher = compiler().start(structure)
    for _ in range(20):
        if matcher.is_stopped():
            break
        copy = matcher.deep_copy()
        mask = np.unpackbits(np.frombuffer(copy.compute_bitmask(), np.uint8), bitorder="little")[: SPEC.vocab_size]
        assert [allows(matcher, token) for token in range(SPEC.vocab_size)] == mask.astype(bool).tolist()
        assert matcher.consume_token(int(random.choice(np.flatnonzero(mask))))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.0, "logit_bias": {1: 2.0}, "repetition_penalty": 1.2}, True),
        ({"temperature": 1.0}, False),
        ({"temperature": 0.0, "logprobs": 0}, False),
        ({"temperature": 0.0, "allowed_token_ids": (1, 2)}, False),
        ({"temperature": 0.0, "ignore_eos": True}, False),
    ],
)
def test_who_chooses_freely(params: dict[str, Any], expected: bool) -> None:
    assert chooses_freely(SamplingParams(**params)) == expected

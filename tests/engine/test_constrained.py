"""Sequences that follow grammars: against a twin that tries every token, and whatever else happens to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from grammar_cases import (
    EOS,
    SPEC,
    TOKENIZER,
    ByTrying,
    compiler,
    make_loop,
    native_executor,
    outputs_by_index,
    reference_executor,
    request,
    text,
    tokens_of,
)

from blendserve.engine.constrained import GrammarConstraints
from blendserve.engine.fake import FifoPolicy
from blendserve.engine.loop import EngineLoop
from blendserve.engine.sequence import Int64s, SequenceTable
from blendserve.engine.step import StepMasks
from blendserve.errors import ExecutorError, RequestError
from blendserve.request import Request, SequenceOutput, StructuredOutputs

OBJECT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "color": {"enum": ["red", "grün", "🙂"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "color", "tags"],
    "additionalProperties": False,
}
STRUCTURES = (
    StructuredOutputs(json=json.dumps(OBJECT)),
    StructuredOutputs(choice=("yes", "no", "maybe 🙂")),
    StructuredOutputs(regex="[a-c]{2,5}(é|-)[0-9]+x"),
    None,
    StructuredOutputs(json='{"type": "array", "items": {"type": "integer"}, "maxItems": 3}'),
    StructuredOutputs(grammar='root ::= "(" [xy]+ ")"'),
    StructuredOutputs(json='{"type": "boolean"}', after="e"),
)
PARAMS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_p": 0.8, "logprobs": 3},
    {"temperature": 1.2, "top_k": 5, "repetition_penalty": 1.3},
    {"temperature": 0.0, "logit_bias": {5: 20.0}, "min_tokens": 12},
    {"temperature": 0.7, "min_p": 0.1, "ignore_eos": True, "frequency_penalty": 0.4},
)


def requests(count: int = 42, **changes: Any) -> list[Request]:
    """Every structure with every set of parameters."""
    return [
        request(i, STRUCTURES[i % len(STRUCTURES)], **{**PARAMS[i // len(STRUCTURES) % len(PARAMS)], **changes})
        for i in range(count)
    ]


def run(loop: EngineLoop, given: Sequence[Request]) -> list[SequenceOutput]:
    with loop:
        return outputs_by_index(loop.run(given, FifoPolicy(len(given))))


def test_masks_agree_with_trying_every_token() -> None:
    given = requests()
    native = run(make_loop(native_executor()), given)
    assert tokens_of(native) == tokens_of(run(make_loop(native_executor(), ByTrying()), given))
    assert {output.finish_reason for output in native} == {"stop", "length"}
    for output in native:
        check_text(output, given[output.index])


def test_the_native_sampler_agrees_with_the_reference() -> None:
    given = requests()
    native = run(make_loop(native_executor()), given)
    reference = run(make_loop(reference_executor(), ByTrying()), given)
    assert tokens_of(native) == tokens_of(reference)
    for ours, theirs in zip(native, reference, strict=True):
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert abs(one.logprob - other.logprob) < 1e-3


def check_text(output: SequenceOutput, asked: Request) -> None:
    """An answer that ended by itself fits its structure."""
    structure = asked.sampling.structured_outputs
    if structure is None or output.finish_reason != "stop":
        return
    answer = text(output)
    if structure.choice:
        assert answer in structure.choice
    elif structure.after and structure.after in answer:
        assert answer.partition(structure.after)[2].strip() in ("true", "false")
    elif structure.json and not structure.after:
        jsonschema.validate(json.loads(answer), json.loads(structure.json))


@pytest.mark.parametrize(
    "changes",
    [{"num_threads": 1}, {"overlap": "on"}, {"num_blocks": 12}],
    ids=["one thread", "overlap", "preemptions"],
)
def test_answers_depend_on_the_request_alone(changes: dict[str, Any]) -> None:
    given = requests()
    expected = tokens_of(run(make_loop(native_executor()), given))
    loop = make_loop(native_executor(**changes), max_tokens=20)
    backwards = [given[-1 - i] for i in range(len(given))]
    found = {}
    with loop:
        for output in loop.run(backwards, FifoPolicy(len(given))):
            found[output.index] = output
        assert (loop.stats.num_preemptions > 0) == ("num_blocks" in changes)
        loop.check()
    assert tokens_of([found[i] for i in range(len(given))]) == expected


def test_one_at_a_time_is_the_same() -> None:
    given = requests(14)
    expected = tokens_of(run(make_loop(native_executor()), given))
    alone = [run(make_loop(native_executor(), max_num_seqs=1), [replace(asked, index=0)])[0] for asked in given]
    assert tokens_of(alone) == expected


def test_a_preempted_sequence_goes_on_in_its_grammar() -> None:
    given = [request(0, STRUCTURES[0], temperature=1.0), request(1, STRUCTURES[1])]
    expected = tokens_of(run(make_loop(native_executor()), given))
    loop = make_loop(native_executor())
    with loop:
        loop.begin(given, FifoPolicy(2))
        found: list[SequenceOutput] = []
        while loop.has_work:
            found += loop.step()
            if loop.stats.num_steps % 4 == 3 and loop.batcher.table.num_running:
                loop.preempt(0)
        assert loop.stats.num_preemptions > 5
    assert tokens_of(outputs_by_index(found)) == expected


def test_max_tokens_cuts_and_says_so() -> None:
    (output,) = run(make_loop(native_executor()), [request(0, STRUCTURES[0], max_tokens=3)])
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 3
    (output,) = run(make_loop(native_executor()), [request(0, StructuredOutputs(choice=("a",)), max_tokens=1)])
    assert (output.finish_reason, text(output)) == ("stop", "a")
    assert not output.has_stop_token


def test_an_answer_that_may_go_on_ends_with_a_token() -> None:
    (output,) = run(
        make_loop(native_executor()), [request(0, StructuredOutputs(regex="a*"), logit_bias={EOS[0]: 50.0})]
    )
    assert (output.finish_reason, output.token_ids.tolist(), text(output)) == ("stop", [EOS[0]], "")
    assert output.has_stop_token
    endless = request(0, StructuredOutputs(regex="a*"), max_tokens=5, logit_bias={EOS[0]: 50.0}, ignore_eos=True)
    (output,) = run(make_loop(native_executor()), [endless])
    assert (output.finish_reason, set(text(output))) == ("length", {"a"})
    bounded = request(0, StructuredOutputs(regex="a{0,4}"), logit_bias={EOS[0]: 50.0}, ignore_eos=True)
    (output,) = run(make_loop(native_executor()), [bounded])
    assert (output.finish_reason, text(output)) == ("stop", "aaaa")


def test_a_grammar_that_is_complete_outweighs_min_tokens() -> None:
    (output,) = run(make_loop(native_executor()), [request(0, StructuredOutputs(choice=("ab",)), min_tokens=30)])
    assert (output.finish_reason, text(output)) == ("stop", "ab")
    patient = request(0, StructuredOutputs(regex="a*"), min_tokens=5, logit_bias={EOS[0]: 50.0})
    (output,) = run(make_loop(native_executor()), [patient])
    assert output.finish_reason == "stop"
    assert len(output.token_ids) == 6
    assert len(text(output)) >= 5


def test_stop_strings_end_an_answer_as_ever() -> None:
    (output,) = run(make_loop(native_executor()), [request(0, StructuredOutputs(choice=("a-b-c",)), stop=("-b",))])
    assert (output.finish_reason, output.stop_reason, text(output)) == ("stop", "-b", "a")


def test_logprobs_are_among_what_the_grammar_leaves() -> None:
    asked = request(0, StructuredOutputs(regex="[ab]c"), logprobs=5, temperature=0.0)
    (output,) = run(make_loop(native_executor()), [asked])
    first, *others = output.logprobs
    assert len(first.top) >= 2
    assert all(TOKENIZER.token_bytes(token)[:1] in b"ab" for token, _ in first.top)
    assert abs(sum(np.exp(logprob) for _, logprob in first.top) - 1) < 1e-4
    assert [entry.logprob for entry in others] == [0.0]


@pytest.mark.parametrize(
    ("structure", "code", "words"),
    [
        (StructuredOutputs(json='{"type": "array", "uniqueItems": true}'), "unsupported_schema", "uniqueItems"),
        (StructuredOutputs(json='{"type": "string", "format": "odd"}'), "unsupported_schema", "odd"),
        (StructuredOutputs(json='{"not": {}}', after="x"), "unsupported_schema", "not"),
        (StructuredOutputs(regex="(a"), "invalid_grammar", "unclosed"),
        (StructuredOutputs(grammar='root ::= "a'), "invalid_grammar", "root"),
        (StructuredOutputs(lark="start: b"), "invalid_grammar", "b"),
    ],
)
def test_what_cannot_be_followed_is_an_error_and_never_an_answer(
    structure: StructuredOutputs, code: str, words: str
) -> None:
    given = [request(0, structure), request(1, None, max_tokens=4), request(2, structure)]
    loop = make_loop(native_executor())
    refused, answered, again = run(loop, given)
    assert isinstance(refused.error, RequestError)
    assert refused.error.code == code
    assert words in refused.error.message
    assert again.error is refused.error
    assert answered.error is None
    assert (loop.stats.num_grammars, loop.stats.num_errors) == (1, 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ('start: b\nb: b "x"', "nothing fits it"),
        ('start: "ab" b\nb: b "x" | c\nc: c "y"', "nothing fits any more in the middle of an answer"),
    ],
)
def test_a_grammar_without_an_end_is_an_error(grammar: str, words: str, temperature: float) -> None:
    loop = make_loop(native_executor())
    output, free = run(
        loop, [request(0, StructuredOutputs(lark=grammar), temperature=temperature), request(1, None, max_tokens=4)]
    )
    assert isinstance(output.error, RequestError)
    assert output.error.code == "invalid_grammar"
    assert words in output.error.message
    assert free.error is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_thousands_of_choices(temperature: float) -> None:
    choices = tuple(f"class {number}" for number in range(3000))
    given = [request(index, StructuredOutputs(choice=choices), temperature=temperature) for index in range(3)]
    for output in run(make_loop(native_executor()), given):
        assert output.finish_reason == "stop"
        assert text(output) in choices


def test_choices_that_begin_alike_and_the_empty_one() -> None:
    biases = {TOKENIZER.encode("a")[0]: 40.0}
    for choices, answers in ((("", "a"), {"a"}), (("a", "aa", "aaab"), {"aa", "aaab"}), (("",), {""})):
        asked = request(0, StructuredOutputs(choice=choices), temperature=0.0, logit_bias=biases)
        (output,) = run(make_loop(native_executor()), [asked])
        assert (output.finish_reason, text(output) in answers) == ("stop", True), choices


def test_an_engine_without_grammars_refuses() -> None:
    loop = make_loop(native_executor())
    loop._constraints = None
    (output,) = run(loop, [request(0, STRUCTURES[1])])
    assert isinstance(output.error, RequestError)
    assert output.error.code == "unsupported_parameter"


class LyingMatcher:
    """A matcher whose work is too much from the second token on."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.num_tokens = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def consume_token(self, token: int) -> bool:
        self.num_tokens += 1
        return self.num_tokens < 2 and bool(self.inner.consume_token(token))

    def get_error(self) -> str:
        return "out of fuel"


class Lying(ByTrying):
    def start(self, structure: StructuredOutputs) -> Any:
        return LyingMatcher(super().start(structure))

    follow = GrammarConstraints.follow


def test_a_grammar_that_fails_in_the_middle_is_an_error() -> None:
    given = [request(0, STRUCTURES[0]), request(1, None, max_tokens=9)]
    failed, free = run(make_loop(native_executor(), Lying()), given)
    assert isinstance(failed.error, RequestError)
    assert failed.error.code == "grammar_too_complex"
    assert "out of fuel" in failed.error.message
    assert free.finish_reason == "length"


class Misfit(ByTrying):
    """Masks that do not fit the model, or the step."""

    def __init__(self, num_words: int, num_rows: int, num_masks: int) -> None:
        super().__init__()
        self.words, self.row_of = np.zeros((num_masks, num_words), np.int32), np.zeros(num_rows, np.int32)

    def masks(self, table: SequenceTable, rows: Int64s) -> StepMasks | None:  # noqa: ARG002
        return StepMasks(self.row_of, lambda: self.words)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((9, 1, 1), "too few for a vocabulary"), ((10, 2, 1), "masks for 2 rows"), ((10, 1, 0), "mask 0 does not exist")],
)
def test_masks_that_do_not_fit_end_the_run(shape: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ExecutorError, match=words):
        run(make_loop(native_executor(), Misfit(*shape)), [request(0, STRUCTURES[0])])


def test_grammars_are_compiled_once_each() -> None:
    made = compiler()
    loop = make_loop(native_executor(), GrammarConstraints(made, 16, 2))
    with loop:
        for _ in range(2):
            list(loop.run(requests(21), FifoPolicy(21)))
            assert loop.stats.num_constrained == 18
    assert made.stats.num_grammars == 6
    assert loop.stats.num_grammars == 0
    assert loop.stats.grammar_mask_s > 0


def test_the_vocabulary_may_have_more_rows_than_the_tokenizer() -> None:
    wide = compiler(vocab_size=SPEC.vocab_size + 40)
    matcher = wide.start(StructuredOutputs(regex="(.|\\n)*"))
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    bits = np.unpackbits(mask, bitorder="little")
    assert not bits[SPEC.vocab_size :].any()
    assert bits[TOKENIZER.encode("a")[0]]

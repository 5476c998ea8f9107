"""Single requests on the fake vLLM: they go ahead of a plan, tell their tokens, and survive what engines do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_fakes import read_rows
from vllm_cases import BY_SCHEDULER, StopError, check_rows, mixed_job, run_vllm, vllm_engine

from blendserve.engine.front import FIRST_INDEX, Front
from blendserve.engines.vllm.driver import VllmDriver
from blendserve.engines.vllm.fake import FakeVllm, answer_to
from blendserve.errors import ExecutorError
from blendserve.request import Request, SamplingParams, SequenceOutput, TokenIds

NUM_LINES = 60
WAYS = pytest.mark.parametrize("arguments", [{}, BY_SCHEDULER], ids=["front", "scheduler"])


class Heard:
    """A front, and what it tells. `ask_at` has requests added after so many outputs of the plan."""

    def __init__(self) -> None:
        self.front = Front(self._on_tokens, self._on_output)
        self.pieces: dict[int, list[list[int]]] = {}
        self.outputs: dict[int, SequenceOutput] = {}
        self.prompts: dict[int, list[int]] = {}

    def ask(self, text: str, max_tokens: int = 9) -> int:
        prompt = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        request = Request(0, prompt, len(prompt), SamplingParams(ignore_eos=True), max_tokens, 0)
        (index,) = self.front.add([request])
        self.prompts[index] = prompt.tolist()
        return index

    def _on_tokens(self, index: int, token_ids: TokenIds) -> None:
        self.pieces.setdefault(index, []).append(token_ids.tolist())

    def _on_output(self, index: int, output: SequenceOutput) -> None:
        assert index not in self.outputs
        self.outputs[index] = output

    def check(self) -> None:
        """Every request has the answer that it gets alone, and its pieces were beginnings of it."""
        assert self.outputs.keys() == self.prompts.keys()
        for index, output in self.outputs.items():
            assert output.error is None
            tokens = answer_to(self.prompts[index], output.num_output_tokens)
            assert output.token_ids.tolist() == tokens
            pieces = self.pieces.get(index, [])
            assert all(tokens[: len(piece)] == piece for piece in pieces)
        assert not self.front.has_work


def run_with(
    engine: VllmDriver, heard: Heard, source: Path, target: Path, asked: dict[int, list[str]], **fields: Any
) -> None:
    """Run a job; after so many outputs these requests are asked."""
    run = engine.run

    def run_and_ask(pending: Any, plan: Any, policy: Any) -> Iterator[SequenceOutput]:
        outputs = run(pending, plan, policy, heard.front)
        try:
            for count, output in enumerate(outputs):
                for text in asked.get(count, ()):
                    heard.ask(text)
                yield output
        finally:
            outputs.close()  # type: ignore[attr-defined]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmDriver, "run", lambda _, *arguments: run_and_ask(*arguments))
        run_vllm(engine, source, target, **fields)


def choices(target: Path) -> dict[str, Any]:
    return {row["custom_id"]: row["response"]["body"]["choices"] for row in read_rows(target)}


@WAYS
@pytest.mark.parametrize(
    "changes", [{}, {"has_own_process": True}, {"dies_at": frozenset({6, 25})}, {"num_blocks": 17}]
)
def test_single_requests_and_the_plan_both_get_their_answers(
    tmp_path: Path, arguments: dict[str, Any], changes: dict[str, Any]
) -> None:
    source = mixed_job(tmp_path / "in.jsonl", NUM_LINES)
    run_vllm(vllm_engine(FakeVllm(), arguments), source, tmp_path / "alone.jsonl")
    heard, api = Heard(), FakeVllm(**changes)
    heard.ask("before anything")
    asked = {3: ["one", "two"], 20: ["three"], 40: [f"many {number}" for number in range(12)]}
    engine = vllm_engine(api, arguments)
    run_with(engine, heard, source, tmp_path / "out.jsonl", asked)
    engine.answer(heard.front)
    assert check_rows(tmp_path / "out.jsonl", NUM_LINES) == {"answer": NUM_LINES}
    assert choices(tmp_path / "out.jsonl") == choices(tmp_path / "alone.jsonl")
    heard.check()
    assert len(heard.outputs) == 16
    assert any(len(pieces) > 3 for pieces in heard.pieces.values())
    assert api.engines[-1].scheduler.num_free == api.num_blocks - 1


@WAYS
def test_a_single_request_comes_in_before_what_the_plan_has_next(tmp_path: Path, arguments: dict[str, Any]) -> None:
    heard, api = Heard(), FakeVllm()
    engine = vllm_engine(api, arguments)
    source = mixed_job(tmp_path / "in.jsonl", NUM_LINES)
    run_with(engine, heard, source, tmp_path / "out.jsonl", {5: ["a question"]})
    order = api.engines[0].order
    place = order.index(str(FIRST_INDEX))
    assert place < 5 + 2 * api.max_num_seqs
    assert len(order) == NUM_LINES + 1


@WAYS
def test_single_requests_are_answered_while_nothing_is_planned(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """After a run that broke off too: none of its requests may come in any more."""
    heard, api = Heard(), FakeVllm()
    engine = vllm_engine(api, arguments)
    heard.ask("first of all")
    engine.answer(heard.front)
    heard.check()
    with pytest.raises(StopError):
        run_vllm(engine, mixed_job(tmp_path / "in.jsonl", NUM_LINES), tmp_path / "out.jsonl", stop_after=10)
    num_added = len(api.engines[0].order)
    for number in range(20):
        heard.ask(f"again {number}")
    engine.answer(heard.front)
    heard.check()
    assert len(api.engines[0].order) == num_added + 20


@WAYS
def test_a_run_that_breaks_off_has_its_single_requests_start_again(tmp_path: Path, arguments: dict[str, Any]) -> None:
    heard, api = Heard(), FakeVllm()
    engine = vllm_engine(api, arguments)
    source = mixed_job(tmp_path / "in.jsonl", NUM_LINES)
    index = heard.ask("long", max_tokens=500)
    with pytest.raises(StopError):
        run_with(engine, heard, source, tmp_path / "out.jsonl", {}, stop_after=10)
    assert str(index) in api.engines[0].aborted
    engine.answer(heard.front)
    heard.check()


def test_what_nobody_wants_any_more_is_taken_out() -> None:
    heard, api = Heard(), FakeVllm()
    engine = vllm_engine(api)
    kept, dropped = heard.ask("kept", 40), heard.ask("dropped", 4000)
    del heard.prompts[dropped]
    on_tokens = heard._on_tokens

    def drop(index: int, token_ids: TokenIds) -> None:
        on_tokens(index, token_ids)
        if index == dropped:
            heard.front.withdraw([dropped])

    heard.front._on_tokens = drop
    engine.answer(heard.front)
    heard.check()
    assert api.engines[0].aborted == [str(dropped)]
    assert kept in heard.outputs


@WAYS
def test_a_single_request_under_which_engines_die_ends_as_an_error(tmp_path: Path, arguments: dict[str, Any]) -> None:
    heard, api = Heard(), FakeVllm(dies_of=frozenset({str(FIRST_INDEX)}))
    engine = vllm_engine(api, arguments)
    source = mixed_job(tmp_path / "in.jsonl", NUM_LINES)
    run_with(engine, heard, source, tmp_path / "out.jsonl", {5: ["poison"], 6: ["harmless"]})
    assert check_rows(tmp_path / "out.jsonl", NUM_LINES) == {"answer": NUM_LINES}
    error = heard.outputs.pop(FIRST_INDEX).error
    del heard.prompts[FIRST_INDEX]
    assert getattr(error, "code", None) == "engine_failure"
    heard.check()


def test_a_single_request_that_vllm_refuses_ends_as_an_error() -> None:
    heard = Heard()
    heard.ask("unwanted")
    vllm_engine(FakeVllm(refuses=frozenset({str(FIRST_INDEX)}))).answer(heard.front)
    assert "not to the engine's liking" in str(heard.outputs[FIRST_INDEX].error)


def test_engines_that_die_one_after_the_other_end_the_answering() -> None:
    heard, api = Heard(), FakeVllm(dies_at=frozenset(range(1, 100)))
    for number in range(12):
        heard.ask(f"{number}")
    with pytest.raises(ExecutorError, match="died 9 times"):
        vllm_engine(api).answer(heard.front)
    assert len(heard.outputs) == 8
    assert all("died each time" in str(output.error) for output in heard.outputs.values())

"""A job on the fakes: files in OpenAI's shapes, exactly once, whatever stops it and however often."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_fakes import (
    FakeCodec,
    FakeEngine,
    batch_line,
    comparable,
    mixed_lines,
    read_rows,
    run_fake,
    write_lines,
)

from blendserve.batchfile.schema import ServedModel
from blendserve.batchfile.store import PendingRequests
from blendserve.errors import CapacityError, ConfigError, ExecutorError, RequestError
from blendserve.job import JobInterrupted, JobProgress
from blendserve.request import Request, SequenceOutput

NUM_LINES = 60
NUM_REQUESTS = 122  # choices of the valid ones among `mixed_lines(60)`


@pytest.fixture
def job_input(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", mixed_lines(NUM_LINES))


@pytest.fixture
def whole(tmp_path: Path, job_input: Path) -> Path:
    """The output of an uninterrupted run, ordered; its errors lie beside it."""
    run_fake(job_input, tmp_path / "whole.jsonl", is_ordered=True)
    return tmp_path / "whole.jsonl"


def stop_after(num_answers: int, error: BaseException) -> FakeEngine:
    """An engine that raises `error` once it has given so many answers."""

    def on_answer(count: int) -> None:
        if count == num_answers:
            raise error

    return FakeEngine(on_answer=on_answer)


def errors_of(output: Path) -> Path:
    return output.with_name(output.name.removesuffix(".jsonl") + ".errors.jsonl")


def test_every_line_is_one_row_of_one_file(tmp_path: Path, job_input: Path) -> None:
    report = run_fake(job_input, tmp_path / "out.jsonl")
    rows, errors = read_rows(tmp_path / "out.jsonl"), read_rows(tmp_path / "out.errors.jsonl")
    assert report.num_lines == NUM_LINES == len(rows) + len(errors)
    assert (report.num_succeeded, report.num_failed) == (len(rows), len(errors))
    assert report.errors_by_code == {"invalid_json_line": NUM_LINES // 9}
    assert sorted(row["custom_id"] for row in rows) == sorted(f"id-{n}" for n in range(NUM_LINES) if n % 9 != 8)
    assert report.errors_path == str(tmp_path / "out.errors.jsonl")
    assert len({row["id"] for row in (*rows, *errors)}) == NUM_LINES


def test_a_chat_row_is_exactly_openais(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "in.jsonl",
        [
            batch_line(
                "a",
                {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 1, "max_tokens": 1},
            )
        ],
    )
    run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    (row,) = read_rows(tmp_path / "out.jsonl")
    key = row["id"].removeprefix("batch_req_")
    (choice,) = row["response"]["body"]["choices"]
    assert list(row) == ["id", "custom_id", "response", "error"]
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
    assert row["response"]["request_id"] == f"req_{key}"
    assert row["response"]["body"] == {
        "id": f"chatcmpl-{key}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [choice],
        "usage": {
            "prompt_tokens": 8,
            "completion_tokens": 1,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "system_fingerprint": None,
    }
    assert list(choice) == ["index", "message", "logprobs", "finish_reason"]
    assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"], "refusal": None}


def test_several_prompts_and_choices_are_numbered_as_openai_does(tmp_path: Path) -> None:
    lines = [batch_line("both", {"prompt": ["one", "two"], "n": 2, "seed": 5, "max_tokens": 9})]
    lines += [batch_line(f"{p}", {"prompt": p, "n": 2, "seed": 5, "max_tokens": 9}) for p in ("one", "two")]
    write_lines(tmp_path / "in.jsonl", lines)
    run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl", FakeEngine("backward"), is_ordered=True)
    both, one, two = (row["response"]["body"] for row in read_rows(tmp_path / "out.jsonl"))
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in both["choices"]]
    assert texts == [choice["text"] for body in (one, two) for choice in body["choices"]]
    assert len(set(texts)) == 4
    assert both["usage"]["prompt_tokens"] == 6
    assert both["usage"]["completion_tokens"] == 36


def test_default_seeds_repeat_and_differ_by_line_and_choice(tmp_path: Path) -> None:
    prompts = [batch_line(name, {"prompt": "same", "n": 3}) for name in ("a", "b")]
    first = write_lines(tmp_path / "1.jsonl", prompts)
    second = write_lines(tmp_path / "2.jsonl", prompts[::-1])
    texts = []
    for path in (first, second):
        output = tmp_path / f"out-{path.name}"
        run_fake(path, output)
        rows = {row["custom_id"]: row["response"]["body"]["choices"] for row in read_rows(output)}
        texts.append([choice["text"] for name in ("a", "b") for choice in rows[name]])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 6


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_the_order_of_answers_changes_nothing_but_the_order_of_rows(
    tmp_path: Path, job_input: Path, whole: Path, order: str
) -> None:
    output = tmp_path / "out.jsonl"
    run_fake(job_input, output, FakeEngine(order))
    assert comparable(output) == comparable(whole)
    run_fake(job_input, output, FakeEngine(order), is_ordered=True, is_fresh=True)
    ids = [row["custom_id"] for row in read_rows(output)]
    assert ids == [f"id-{number}" for number in range(NUM_LINES) if number % 9 != 8]


@pytest.mark.parametrize("num_answers", [0, 1, 7, 30, 77])
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(
    tmp_path: Path, job_input: Path, whole: Path, num_answers: int
) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(JobInterrupted, match=f"{num_answers} of .* run the same command again") as caught:
        run_fake(job_input, output, stop_after(num_answers, KeyboardInterrupt()))
    assert caught.value.exit_code == 130
    assert not output.exists()
    engine = FakeEngine("backward")
    report = run_fake(job_input, output, engine, clock=lambda: 1_800_000_000.0)
    assert report.num_resumed == num_answers
    assert comparable(output) == comparable(whole)
    assert comparable(errors_of(output)) == comparable(errors_of(whole))
    assert engine.num_answers == NUM_REQUESTS - num_answers


def test_sigterm_ends_a_job_as_ctrl_c_does(tmp_path: Path, job_input: Path, whole: Path) -> None:
    def terminate(count: int) -> None:
        if count == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(JobInterrupted) as caught:
        run_fake(job_input, tmp_path / "out.jsonl", FakeEngine(on_answer=terminate))
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    run_fake(job_input, tmp_path / "out.jsonl")
    assert comparable(tmp_path / "out.jsonl") == comparable(whole)


def test_an_interrupt_while_reading_loses_nothing(tmp_path: Path, job_input: Path, whole: Path) -> None:
    class InterruptedCodec(FakeCodec):
        def encode(self, prompts: Any) -> Any:  # noqa: ARG002
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted, match="before any request"):
        run_fake(job_input, tmp_path / "out.jsonl", codec=InterruptedCodec())
    run_fake(job_input, tmp_path / "out.jsonl")
    assert comparable(tmp_path / "out.jsonl") == comparable(whole)


def test_a_resumed_job_does_not_encode_again(tmp_path: Path, job_input: Path) -> None:
    with pytest.raises(ExecutorError, match="broke"):
        run_fake(job_input, tmp_path / "out.jsonl", stop_after(9, ExecutorError("the executor broke")))
    codec = FakeCodec()
    run_fake(job_input, tmp_path / "out.jsonl", codec=codec)
    assert codec.num_calls == 0


def test_a_journal_cut_anywhere_resumes_to_the_same_files(tmp_path: Path, job_input: Path, whole: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(JobInterrupted):
        run_fake(job_input, output, stop_after(60, KeyboardInterrupt()))
    records = tmp_path / "out.jsonl.journal" / "records"
    header = json.loads((records.parent / "header.json").read_text())
    content = records.read_bytes()
    random = np.random.default_rng(5)
    for length in random.integers(header["num_ingest_bytes"], len(content), 12).tolist():
        records.write_bytes(content[:length])
        with pytest.raises(JobInterrupted):  # stop again before the journal is sealed
            run_fake(job_input, output, stop_after(3, KeyboardInterrupt()))
    report = run_fake(job_input, output)
    assert comparable(output) == comparable(whole)
    assert comparable(errors_of(output)) == comparable(errors_of(whole))
    assert report.num_resumed >= 3


def test_a_journal_that_lost_what_was_read_is_refused(tmp_path: Path, job_input: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(JobInterrupted):
        run_fake(job_input, output, stop_after(3, KeyboardInterrupt()))
    (tmp_path / "out.jsonl.journal" / "records").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"damaged.*--fresh"):
        run_fake(job_input, output)
    run_fake(job_input, output, is_fresh=True)


def test_a_finished_job_is_not_run_again(tmp_path: Path, job_input: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = run_fake(job_input, output)
    content = output.read_bytes()
    engine = FakeEngine()
    again = run_fake(job_input, output, engine)
    assert again.was_complete
    assert engine.num_answers == 0
    assert (again.num_succeeded, again.errors_by_code, again.notes) == (
        first.num_succeeded,
        first.errors_by_code,
        first.notes,
    )
    assert output.read_bytes() == content
    assert sorted(path.name for path in (tmp_path / "out.jsonl.journal").iterdir()) == ["complete.json", "lock"]
    run_fake(job_input, output, engine, is_fresh=True)
    assert engine.num_answers > 0


def test_a_finished_job_whose_files_changed_is_refused_and_one_whose_output_is_gone_runs(
    tmp_path: Path, job_input: Path
) -> None:
    output = tmp_path / "out.jsonl"
    run_fake(job_input, output)
    with pytest.raises(ConfigError, match="--ordered --fresh"):
        run_fake(job_input, output, is_ordered=True)
    with output.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(ConfigError, match="changed since"):
        run_fake(job_input, output)
    output.unlink()
    assert not run_fake(job_input, output).was_complete


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"dtype": "int8"}}, "dtype was None, is int8"),
        (
            {"served": ServedModel(("tiny", "models/tiny"), vocab_size=256, max_model_len=1024)},
            "max_model_len was 2048",
        ),
        ({"served": ServedModel(("tiny",), vocab_size=256, max_model_len=2048)}, "model names"),
        ({"max_line_bytes": 5000}, "max_line_bytes"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_journal_of_other_settings_is_refused(
    tmp_path: Path, job_input: Path, changes: dict[str, Any], words: str, is_finished: bool
) -> None:
    output = tmp_path / "out.jsonl"
    if is_finished:
        run_fake(job_input, output)
    else:
        with pytest.raises(JobInterrupted):
            run_fake(job_input, output, stop_after(3, KeyboardInterrupt()))
    with pytest.raises(ConfigError, match=f"another job.*{words}.*--fresh"):
        run_fake(job_input, output, **changes)


def test_a_journal_of_another_input_is_refused(tmp_path: Path, job_input: Path) -> None:
    with pytest.raises(JobInterrupted):
        run_fake(job_input, tmp_path / "out.jsonl", stop_after(3, KeyboardInterrupt()))
    write_lines(job_input, [*mixed_lines(NUM_LINES), batch_line("one more")])
    with pytest.raises(ConfigError, match=r"input .sha256. was"):
        run_fake(job_input, tmp_path / "out.jsonl")
    assert run_fake(job_input, tmp_path / "out.jsonl", is_fresh=True).num_lines == NUM_LINES + 1


def test_a_job_in_use_is_refused(tmp_path: Path, job_input: Path) -> None:
    def start_again(count: int) -> None:
        if count == 2:
            with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
                run_fake(job_input, tmp_path / "out.jsonl", is_fresh=True)

    report = run_fake(job_input, tmp_path / "out.jsonl", FakeEngine(on_answer=start_again))
    assert report.num_lines == NUM_LINES


def test_errors_of_the_engine_are_rows(tmp_path: Path) -> None:
    def generate(pending: PendingRequests) -> Iterator[SequenceOutput]:
        causes = [
            RequestError("too much KV", code="kv_too_small", status_code=413),
            CapacityError("out of memory"),
            RequestError("overloaded", code="overloaded", status_code=503),
            None,
        ]
        for index, cause in enumerate(causes):
            yield SequenceOutput(index, np.zeros(0, np.int32), "error", 5, 0, error=cause)
        yield from FakeEngine()(PendingRequests(pending.store, pending.numbers[4:]))

    lines = [batch_line("a"), batch_line("b", {"prompt": "x", "n": 2}), batch_line("c")]
    write_lines(tmp_path / "in.jsonl", lines)
    report = run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl", generate)
    rows = {row["custom_id"]: row for row in read_rows(tmp_path / "out.errors.jsonl")}
    assert rows["a"]["response"]["status_code"] == 413
    assert rows["a"]["response"]["body"]["error"] == {
        "message": "line 1: too much KV",
        "type": "invalid_request_error",
        "param": None,
        "code": "kv_too_small",
    }
    assert rows["b"]["response"] is None
    assert rows["b"]["error"] == {"code": "server_error", "message": "line 2: out of memory", "line": 2}
    assert rows["c"]["error"]["code"] == "server_error"
    assert read_rows(tmp_path / "out.jsonl") == []
    assert report.errors_by_code == {"kv_too_small": 1, "server_error": 2}


def test_an_engine_that_forgets_or_repeats_is_found_out(tmp_path: Path, job_input: Path) -> None:
    def forgetful(pending: PendingRequests) -> Iterator[SequenceOutput]:
        return iter(list(FakeEngine()(pending))[:-1])

    def repeating(pending: PendingRequests) -> Iterator[SequenceOutput]:
        first = next(FakeEngine()(PendingRequests(pending.store, np.asarray([1]))))
        return iter([first, first])

    with pytest.raises(ExecutorError, match="1 of 60 lines unanswered"):
        run_fake(job_input, tmp_path / "out.jsonl", forgetful)
    run_fake(job_input, tmp_path / "out.jsonl")
    several = write_lines(tmp_path / "n.jsonl", [batch_line("a", {"prompt": "x", "n": 3})])
    with pytest.raises(ExecutorError, match="twice"):
        run_fake(several, tmp_path / "n-out.jsonl", repeating)


def test_error_rows_of_both_kinds_name_their_line(tmp_path: Path) -> None:
    lines: list[dict[str, Any] | str | bytes] = [
        batch_line("a", {"prompt": "x", "tools": []}),
        b"{",
        batch_line("b", {"messages": [{"role": "user", "content": "unspeakable"}]}),
        batch_line("c", {"prompt": "y" * 5000}),
        batch_line("d", {"prompt": "fine"}),
        batch_line("d", {"prompt": "fine"}),
    ]
    write_lines(tmp_path / "in.jsonl", lines)
    run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    errors = read_rows(tmp_path / "out.errors.jsonl")
    assert [row["custom_id"] for row in errors] == ["a", None, "b", "c", "d"]
    bodies = [row["response"]["body"]["error"] if row["response"] else row["error"] for row in errors]
    assert [body["code"] for body in bodies] == [
        "unknown_parameter",
        "invalid_json_line",
        "invalid_value",
        "context_length_exceeded",
        "duplicate_custom_id",
    ]
    for number, body in zip((1, 2, 3, 4, 6), bodies, strict=True):
        assert body["message"].startswith(f"line {number}: ")
    assert [row["error"] and row["error"]["line"] for row in errors] == [None, 2, None, None, 6]


def test_rows_are_one_line_to_every_reader(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [batch_line("a\u2028b\x85c\u2029d é")])
    run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["custom_id"] == "a\u2028b\x85c\u2029d é"
    assert "é" in line


def test_no_error_rows_no_error_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [b"{"])
    run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (tmp_path / "out.errors.jsonl").exists()
    write_lines(tmp_path / "in.jsonl", [batch_line("a")])
    report = run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl", is_fresh=True)
    assert not (tmp_path / "out.errors.jsonl").exists()
    assert report.errors_path is None


def test_an_empty_file_is_an_empty_output(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [b"", b""])
    engine = FakeEngine()
    report = run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl", engine)
    assert (report.num_lines, (tmp_path / "out.jsonl").read_bytes()) == (0, b"")


def test_the_report_says_which_name_was_served_by_which_model(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [batch_line("a", {"prompt": "x", "model": "gpt-4o"}), batch_line("b")])
    chosen = ServedModel(("tiny",), accepts_any_name=True)
    report = run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl", served=chosen)
    assert (report.requested_model, report.served_model) == ("gpt-4o", "tiny")
    assert report.notes == ("The file asks for gpt-4o; it was answered by tiny.",)
    assert report.errors_by_code == {"mismatched_model": 1}
    assert read_rows(tmp_path / "out.jsonl")[0]["response"]["body"]["model"] == "tiny"


def test_progress_counts_requests_of_earlier_runs_but_tokens_of_this_one(tmp_path: Path, job_input: Path) -> None:
    seen: list[tuple[int, int]] = []

    def on_progress(progress: JobProgress) -> None:
        seen.append((progress.num_done, progress.num_requests))

    with pytest.raises(JobInterrupted):
        run_fake(job_input, tmp_path / "out.jsonl", stop_after(10, KeyboardInterrupt()))
    report = run_fake(job_input, tmp_path / "out.jsonl", on_progress=on_progress)
    assert seen == [(done, NUM_REQUESTS) for done in range(10, NUM_REQUESTS + 1)]
    assert report.num_cached_tokens > 0
    assert 0 < report.num_output_tokens < NUM_REQUESTS * 12


def test_known_lengths_and_limits_reach_the_policy(tmp_path: Path) -> None:
    tables = []

    def generate(pending: PendingRequests) -> Iterator[SequenceOutput]:
        tables.append(pending.table())
        prompts = pending.flat_prompts()
        for row in range(len(pending)):
            begin, end = prompts.offsets[row : row + 2]
            assert prompts.token_ids[begin:end].tolist() == pending[row].prompt_token_ids.tolist()
            assert pending[row].num_prompt_tokens == tables[0].num_prompt_tokens[row]
            assert pending[row].max_output_tokens == tables[0].max_output_tokens[row]
        return FakeEngine()(pending)

    lines = [
        batch_line("a", {"prompt": "abc", "max_tokens": 5}),
        batch_line("b", {"prompt": ["de", "f"], "max_tokens": 5, "ignore_eos": True, "n": 2}),
        batch_line("c", {"prompt": "abc", "max_tokens": 5, "ignore_eos": True, "stop": "x"}),
        batch_line("d", {"prompt": "abc", "max_tokens": 5, "min_tokens": 5}),
        batch_line("e", {"prompt": "a" * 2046, "max_tokens": 5, "ignore_eos": True}),
        batch_line("f", {"messages": [{"role": "user", "content": "a"}]}),
    ]
    write_lines(tmp_path / "in.jsonl", lines)
    run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl", generate)
    (table,) = tables
    assert table.num_prompt_tokens.tolist() == [3, 2, 2, 1, 1, 3, 3, 2046, 7]
    assert table.max_output_tokens.tolist() == [5, 5, 5, 5, 5, 5, 5, 2, 2041]
    assert table.known_output_tokens.tolist() == [-1, 5, 5, 5, 5, -1, 5, 2, -1]


def test_sampling_parameters_survive_the_store(tmp_path: Path) -> None:
    found: list[Request] = []

    def generate(pending: PendingRequests) -> Iterator[SequenceOutput]:
        found.extend(pending[row] for row in range(len(pending)))
        return FakeEngine()(pending)

    bodies: list[dict[str, Any]] = [
        {"prompt": "a", "seed": -1, "stop": ["x", "é"], "logit_bias": {"7": 1}, "temperature": 0},
        {
            "prompt": "b",
            "seed": 2**63 - 1,
            "stop": ["x", "é"],
            "logit_bias": {"7": 1},
            "temperature": 0,
            "max_tokens": 3,
        },
        {"prompt": "c", "stop_token_ids": [1, 2]},
    ]
    write_lines(tmp_path / "in.jsonl", [batch_line(body["prompt"], body) for body in bodies])
    run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl", generate)
    first, second, third = found
    assert first.sampling.stop == second.sampling.stop == ("x", "é")
    assert first.sampling.logit_bias == {7: 1.0}
    assert (first.sampling.seed, first.seed) == (-1, 2**63 - 1)
    assert (second.sampling.seed, second.sampling.max_tokens) == (2**63 - 1, 3)
    assert (third.sampling.seed, third.sampling.stop_token_ids) == (None, (1, 2))
    assert 0 <= third.seed < 2**63

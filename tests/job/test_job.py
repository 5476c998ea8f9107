"""A job on the fakes: files in OpenAI's shapes, every line exactly once, whatever the engine does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_fakes import (
    NUM_JOB_LINES,
    NUM_JOB_REQUESTS,
    FakeEngine,
    batch_line,
    comparable,
    read_rows,
    run_fake,
    stop_after,
    write_lines,
)

from blendserve.dialect.schema import ServedModel
from blendserve.errors import CapacityError, ConfigError, ExecutorError, RequestError
from blendserve.job.interrupts import JobInterrupted
from blendserve.job.job import JobProgress
from blendserve.job.pending import PendingRequests
from blendserve.request import Request, SequenceOutput


def test_every_line_is_one_row_of_one_file(tmp_path: Path, job_input: Path) -> None:
    report = run_fake(job_input, tmp_path / "out.jsonl")
    rows, errors = read_rows(tmp_path / "out.jsonl"), read_rows(tmp_path / "out.errors.jsonl")
    assert report.num_lines == NUM_JOB_LINES == len(rows) + len(errors)
    assert (report.num_succeeded, report.num_failed) == (len(rows), len(errors))
    assert report.errors_by_code == {"invalid_json_line": NUM_JOB_LINES // 9}
    assert sorted(row["custom_id"] for row in rows) == sorted(f"id-{n}" for n in range(NUM_JOB_LINES) if n % 9 != 8)
    assert report.errors_path == str(tmp_path / "out.errors.jsonl")
    assert len({row["id"] for row in (*rows, *errors)}) == NUM_JOB_LINES


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
    assert ids == [f"id-{number}" for number in range(NUM_JOB_LINES) if number % 9 != 8]


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
    assert rows["b"]["error"] == {"code": "insufficient_memory", "message": "line 2: out of memory", "line": 2}
    assert rows["c"]["error"]["code"] == "server_error"
    assert read_rows(tmp_path / "out.jsonl") == []
    assert report.errors_by_code == {"kv_too_small": 1, "insufficient_memory": 1, "server_error": 1}


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


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [b"", b""])
    with pytest.raises(ConfigError, match="is empty: a batch file has one request in each line"):
        run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


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
    assert seen == [(done, NUM_JOB_REQUESTS) for done in range(10, NUM_JOB_REQUESTS + 1)]
    assert report.num_cached_tokens > 0
    assert 0 < report.num_output_tokens < NUM_JOB_REQUESTS * 12


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
        {"prompt": "d", "allowed_token_ids": [4, 3], "bad_words": ["x"], "skip_special_tokens": False},
    ]
    write_lines(tmp_path / "in.jsonl", [batch_line(body["prompt"], body) for body in bodies])
    run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl", generate)
    first, second, third, fourth = found
    assert first.sampling.stop == second.sampling.stop == ("x", "é")
    assert first.sampling.logit_bias == {7: 1.0}
    assert (first.sampling.seed, first.seed) == (-1, 2**63 - 1)
    assert (second.sampling.seed, second.sampling.max_tokens) == (2**63 - 1, 3)
    assert (third.sampling.seed, third.sampling.stop_token_ids) == (None, (1, 2))
    assert third.sampling.allowed_token_ids is None
    assert (fourth.sampling.allowed_token_ids, fourth.sampling.bad_words) == ((4, 3), ("x",))
    assert not fourth.sampling.skip_special_tokens
    assert 0 <= third.seed < 2**63


def test_a_prompt_is_cut_to_its_last_tokens(tmp_path: Path) -> None:
    """One token per byte; the context holds 2048."""
    found: list[Request] = []

    def generate(pending: PendingRequests) -> Any:
        found.extend(pending[row] for row in range(len(pending)))
        return FakeEngine()(pending)

    cut = {"truncate_prompt_tokens": 3}
    fitted = {"truncate_prompt_tokens": -1, "max_tokens": 100}
    bodies: list[dict[str, Any]] = [
        {"prompt": "abcdef", **cut},
        {"prompt": "ab", **cut},
        {"prompt": ["abcdef", [1, 2, 3, 4, 5]], **cut},
        {"prompt": "x" * 3000 + "y", **fitted},
        {"prompt": "x" * 3000, "truncate_prompt_tokens": 2048},
    ]
    write_lines(tmp_path / "in.jsonl", [batch_line(str(number), body) for number, body in enumerate(bodies)])
    report = run_fake(tmp_path / "in.jsonl", tmp_path / "out.jsonl", generate)
    assert [request.prompt_token_ids.tolist() for request in found[:4]] == [
        [*b"def"],
        [*b"ab"],
        [*b"def"],
        [3, 4, 5],
    ]
    assert found[4].prompt_token_ids.tolist() == [*b"x" * 1947, *b"y"]
    assert report.errors_by_code == {"context_length_exceeded": 1}

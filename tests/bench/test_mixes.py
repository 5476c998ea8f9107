"""Blended files and the tables made of their runs, without an engine."""

from __future__ import annotations

import json
from pathlib import Path

import mixes
import peer_files
import policies
import pytest
import token_mixes
from peaks import Peak

from blendserve.models.known import SMOLLM2_135M


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"subject": subject, "split": split, "question": f"{subject} {i}?", "choices": list("wxyz"), "answer": "B"}
        for subject in ("algebra", "law")
        for split, count in (("dev", 5), ("test", 9))
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_grouped_files_hold_one_kind_after_the_other(questions: Path) -> None:
    lines = mixes.build(mixes.Mix("m", 16, 4, 100, 3, is_grouped=True), questions)
    assert [line.output_tokens for line in lines[:19]] == [mixes.ANSWER_TOKENS] * 16 + [mixes.SUMMARY_TOKENS] * 3
    assert all(50 <= line.output_tokens <= 150 for line in lines[19:])
    assert len(lines) == 16 + 3 + 4


def test_shuffled_files_hold_the_same_lines(questions: Path) -> None:
    grouped = mixes.build(mixes.Mix("m", 16, 4, 100, 3, is_grouped=True), questions)
    shuffled = mixes.build(mixes.Mix("m", 16, 4, 100, 3, is_grouped=False), questions)
    assert shuffled != grouped
    assert sorted(shuffled, key=str) == sorted(grouped, key=str)


def test_questions_of_a_subject_share_their_solved_ones(questions: Path) -> None:
    lines = mixes.build(mixes.Mix("m", 16, 0, 100, 0, is_grouped=True), questions)
    heads = {str(line.prompt).rsplit("\n\n", 1)[0] for line in lines}
    assert len(heads) == 2
    assert all(head.count("Answer: B") == 5 for head in heads)


def test_a_batch_file_is_what_the_endpoint_takes(questions: Path, tmp_path: Path) -> None:
    lines = mixes.build(mixes.MIXES[2].scaled(0.02), questions)
    mixes.write_batch_file(lines, tmp_path / "m.jsonl")
    rows = [json.loads(text) for text in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["body"]["max_tokens"] for row in rows] == [line.output_tokens for line in lines]
    assert len({row["custom_id"] for row in rows}) == len(lines)


@pytest.mark.model
def test_a_whole_file_is_answered_and_told(questions: Path, tmp_path: Path) -> None:
    lines = mixes.build(mixes.Mix("m", 4, 1, 4, 0, is_grouped=True), questions)
    mixes.write_batch_file(lines, tmp_path / "m.jsonl")
    summary = mixes.run_batch_file(tmp_path / "m.jsonl", ["--policy", "dfs", "--overlap", "on", "--kv-memory", "64MiB"])
    outcome = policies.outcome_of(summary, 0.5, 0.0, 1e-4)
    assert summary["num_output_tokens"] == sum(line.output_tokens for line in lines)
    assert outcome.elapsed_s > 0
    assert 0 < outcome.sharing < 1
    assert outcome.num_recomputed_tokens == 0


def test_peers_are_compared_within_a_repeat() -> None:
    times = {"ours-bf16": [2.0, 20.0, 2.0], "peer": [4.0, 40.0, 5.0]}  # the machine was slow in the second repeat
    runs = [peer_files.FileRun(name, i, s, 0.0) for name, own in times.items() for i, s in enumerate(own)]
    table = peer_files.table(runs, peer_files.FileWork(1000, 3e9), Peak(6e9, 12e9, "a test"))
    assert "2.00 (2.00..2.50)x" in table
    assert table.splitlines()[2].split("|")[4].strip() == "25%"


def test_shared_prefixes_are_computed_once() -> None:
    lines = token_mixes.token_lines("pool", 0.05)
    prompts = mixes.encode(lines)
    work = peer_files.work_of(lines, prompts, SMOLLM2_135M)
    each = [peer_files.work_of([line], [prompt], SMOLLM2_135M) for line, prompt in zip(lines, prompts, strict=True)]
    shared = 7 * 1040 * 2 * SMOLLM2_135M.num_layers * SMOLLM2_135M.num_layer_parameters
    assert work.num_tokens == sum(one.num_tokens for one in each)
    assert work.flop == pytest.approx(sum(one.flop for one in each) - shared)

"""Jobs that are planned in windows: which requests share one, and that answers are those of one plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from batch_fakes import NUM_JOB_REQUESTS, SERVED, FakeEngine, comparable, run_fake

from blendserve.dialect.schema import BatchLine
from blendserve.job import windows
from blendserve.job.interrupts import JobInterrupted
from blendserve.job.job import JobProgress
from blendserve.job.pending import PendingRequests
from blendserve.job.store import TokenStore
from blendserve.job.store_writer import StoreWriter
from blendserve.job.windows import windows_of
from blendserve.planner.tree import PrefixTree
from blendserve.request import SamplingParams


@contextmanager
def stored(prompts: list[list[int]]) -> Iterator[PendingRequests]:
    """Prompts in a store on the disk, one line each."""
    with TemporaryDirectory() as name:
        writer = StoreWriter(Path(name) / "store")
        for number, prompt in enumerate(prompts, start=1):
            writer.add(BatchLine(number, f"id-{number}", "/v1/completions", None, ("",), SamplingParams()), [prompt])
        store = TokenStore.open(Path(name) / "store", writer.finish(), SERVED.max_model_len)
        yield PendingRequests(store, np.arange(len(prompts)))


def num_unique_tokens(pending: PendingRequests, rows: np.ndarray) -> int:
    return PendingRequests(pending.store, pending.numbers[rows]).prefix_tree().num_unique_tokens


@pytest.fixture
def shuffled() -> list[list[int]]:
    """40 groups of 25 prompts, which share 50 tokens in a group."""
    rng = np.random.default_rng(5)
    prompts = [[group] * 50 + rng.integers(0, 200, 5).tolist() for group in range(40) for _ in range(25)]
    return [prompts[at] for at in rng.permutation(len(prompts))]


def test_every_request_is_in_one_window_of_about_the_length(shuffled: list[list[int]]) -> None:
    with stored(shuffled) as pending:
        found = windows_of(pending, 100)
    assert sorted(np.concatenate(found).tolist()) == list(range(1000))
    assert len(found) >= 10
    assert max(map(len, found)) <= 125
    assert all((np.diff(rows) > 0).all() for rows in found)


def test_windows_cut_next_to_no_shared_beginning(shuffled: list[list[int]]) -> None:
    with stored(shuffled) as pending:
        whole = pending.prefix_tree().num_unique_tokens
        apart = sum(num_unique_tokens(pending, rows) for rows in windows_of(pending, 100))
        by_place = sum(num_unique_tokens(pending, rows) for rows in np.array_split(np.arange(1000), 10))
    assert whole <= apart <= whole + 9 * 51
    assert by_place > 2 * apart  # what windows in the order of the file would cost


def test_equal_prompts_do_not_make_a_window_longer() -> None:
    with stored([[7, 7, 7]] * 300) as pending:
        found = windows_of(pending, 100)
    assert max(map(len, found)) <= 125
    assert sorted(np.concatenate(found).tolist()) == list(range(300))


def test_few_requests_are_one_window(shuffled: list[list[int]]) -> None:
    with stored(shuffled[:100]) as pending:
        (rows,) = windows_of(pending, 100)
    assert rows.tolist() == list(range(100))


def test_prompts_of_a_window_are_those_of_the_store(shuffled: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blendserve.job.store._CHUNK_TOKENS", 64)
    monkeypatch.setattr(windows, "_CHUNK_REQUESTS", 7)
    with stored(shuffled) as pending:
        for rows in windows_of(pending, 90):
            part = PendingRequests(pending.store, pending.numbers[rows])
            flat, table = part.flat_prompts(), part.table()
            expected = [shuffled[row] for row in rows]
            assert [part[at].prompt_token_ids.tolist() for at in range(len(part))] == expected
            assert [
                flat.token_ids[begin:end].tolist()
                for begin, end in zip(flat.offsets[:-1], flat.offsets[1:], strict=True)
            ] == expected
            assert table.num_prompt_tokens.tolist() == [len(prompt) for prompt in expected]
            assert (
                part.prefix_tree().num_unique_tokens
                == PrefixTree.from_prompts(np.asarray(prompt, np.int32) for prompt in expected).num_unique_tokens
            )


def test_answers_are_those_of_one_plan(tmp_path: Path, job_input: Path) -> None:
    run_fake(job_input, tmp_path / "whole.jsonl")
    sizes: list[int] = []
    progress: list[JobProgress] = []
    engine = FakeEngine()

    def generate(pending: PendingRequests):  # type: ignore[no-untyped-def]
        sizes.append(len(pending))
        return engine(pending)

    report = run_fake(job_input, tmp_path / "out.jsonl", generate, max_planned=20, on_progress=progress.append)
    assert f"planned in {len(sizes)} parts, one after the other" in report.notes[-1]
    assert len(sizes) > 5
    assert max(sizes) <= 25
    assert sum(sizes) == NUM_JOB_REQUESTS
    assert progress[-1].num_windows == len(sizes)
    assert comparable(tmp_path / "out.jsonl") == comparable(tmp_path / "whole.jsonl")


def test_a_job_goes_on_in_the_middle_of_a_window(tmp_path: Path, job_input: Path) -> None:
    run_fake(job_input, tmp_path / "whole.jsonl")

    def interrupt(count: int) -> None:
        if count == 33:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted, match=f"of {NUM_JOB_REQUESTS} requests are finished"):
        run_fake(job_input, tmp_path / "out.jsonl", FakeEngine(on_answer=interrupt), max_planned=20)
    rest = FakeEngine()
    run_fake(job_input, tmp_path / "out.jsonl", rest, max_planned=20)
    assert 0 < rest.num_answers < NUM_JOB_REQUESTS
    assert comparable(tmp_path / "out.jsonl") == comparable(tmp_path / "whole.jsonl")

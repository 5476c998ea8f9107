"""Batches that are planned together answer as they do alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from batch_fakes import answer, mixed_lines, write_lines
from parallel_cases import pending_of

from blendserve.errors import RequestError
from blendserve.job.pending import PendingRequests
from blendserve.serve.joined import RoundRequests


@pytest.fixture
def parts(tmp_path: Path) -> list[PendingRequests]:
    sizes = (20, 1, 33)
    return [
        pending_of(tmp_path / f"store{n}", write_lines(tmp_path / f"{n}.jsonl", mixed_lines(size)))
        for n, size in enumerate(sizes)
    ]


def join(parts: list[PendingRequests], withdrawn: frozenset[int] = frozenset()) -> RoundRequests:
    left = [PendingRequests(part.store, part.numbers[n::2]) for n, part in enumerate(parts)]
    return RoundRequests(left, lambda part: part in withdrawn)


def test_a_joined_request_is_the_request_of_its_part(parts: list[PendingRequests]) -> None:
    joined = join(parts)
    assert len(joined) == sum(len(part.numbers[n::2]) for n, part in enumerate(parts))
    for index in range(len(joined)):
        part, number = joined.place_of(index)
        alone, together = answer(parts[part].store.request(number, index)), answer(joined[index])
        assert together.token_ids.tolist() == alone.token_ids.tolist()
        row = int(joined.store.line_of_request[joined.numbers[index]])
        own_row = int(parts[part].store.line_of_request[number])
        assert joined.store.body(row) == parts[part].store.body(own_row)
        own, found = parts[part].store.line(own_row), joined.store.line(row)
        assert (found.custom_id, found.url, found.line_number) == (own.custom_id, own.url, own.line_number)


def test_tables_and_prompts_are_those_of_the_parts(parts: list[PendingRequests]) -> None:
    joined = join(parts)
    tables = [part.store.table(part.numbers[n::2]) for n, part in enumerate(parts)]
    for name in ("num_prompt_tokens", "max_output_tokens", "known_output_tokens"):
        wanted = np.concatenate([getattr(table, name) for table in tables])
        assert getattr(joined.table(), name).tolist() == wanted.tolist()
    assert joined.prefix_tree().num_prompt_tokens == joined.table().num_prompt_tokens.sum()


def test_a_withdrawn_part_costs_nothing(parts: list[PendingRequests]) -> None:
    joined = join(parts, frozenset((0,)))
    for index in range(len(joined)):
        if joined.place_of(index)[0] == 0:
            with pytest.raises(RequestError, match="withdrawn"):
                joined[index]
        else:
            assert joined[index].index == index

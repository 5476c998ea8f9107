"""The search of bench/overlap.py for a step whose compute and memory take equally long."""

import pytest
from overlap import balanced_tokens


@pytest.mark.parametrize(
    ("balance", "expected"), [(0, 0), (1, 8), (8, 8), (45, 48), (255, 256), (256, 256), (1000, 256)]
)
def test_finds_the_first_step_where_compute_is_not_behind(balance: int, expected: int) -> None:
    asked = []

    def compute_lead(num_tokens: int) -> float:
        asked.append(num_tokens)
        return (num_tokens - balance) * 1e-4

    assert balanced_tokens(compute_lead, 256) == expected
    assert len(asked) <= 6, "each step that is asked for takes time"

"""Both ends of the dual scanner, requests that come back, and requests that leave out of turn."""

from __future__ import annotations

import numpy as np
import pytest

from blendserve.planner.scanner import NO_REQUEST, DualScanner

NOBODY = np.zeros(0, dtype=np.int64)


def test_a_request_that_came_back_and_left_out_of_turn_is_not_offered_again() -> None:
    scanner = DualScanner(np.arange(6), NOBODY)
    for request in (5, 4):
        scanner.take(request)
    scanner.put_back(5, at_memory_end=True)
    scanner.put_back(4, at_memory_end=True)
    scanner.take(5)  # found further from the end, not at it
    scanner.take(4)
    assert scanner.peek_memory_end() == 3
    assert scanner.peek_compute_end() == 0
    scanner.put_back(5, at_memory_end=True)
    assert scanner.peek_memory_end() == 5


@pytest.mark.parametrize("seed", range(5))
def test_every_request_leaves_once_whatever_comes_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scanner = DualScanner(rng.permutation(30), np.array([3, 7]))
    running: list[int] = []
    while scanner.num_waiting or len(running) > 5:
        choice = rng.integers(5)
        if choice == 4 and running:
            scanner.put_back(running.pop(int(rng.integers(len(running)))), at_memory_end=bool(rng.integers(2)))
            running = running[: max(0, len(running) - 1)]  # one ends for good
            continue
        looks = (scanner.peek_first, scanner.peek_compute_end, scanner.peek_memory_end)
        request = looks[choice]() if choice < 3 else scanner.look_past_memory_end(int(rng.integers(10)))
        if request == NO_REQUEST:
            running = running[1:]
            continue
        assert scanner.is_waiting(request)
        scanner.take(request)
        running.append(request)
    assert scanner.peek_compute_end() == scanner.peek_memory_end() == scanner.peek_first() == NO_REQUEST

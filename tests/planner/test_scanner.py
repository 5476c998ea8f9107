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


@pytest.mark.parametrize("seed", range(3))
def test_looking_past_the_gaps_finds_the_next_that_waits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(200)
    scanner = DualScanner(order, NOBODY)
    left = set(range(199))  # places; the head stays
    while left:
        distance = int(rng.integers(200))
        expected = next((place for place in range(199 - distance, -1, -1) if place in left or place == 199), NO_REQUEST)
        found = scanner.look_past_memory_end(distance)
        assert found == (order[expected] if expected != NO_REQUEST else NO_REQUEST)
        ahead = [199, *sorted(left, reverse=True)]
        assert scanner.first_at_memory_end(3) == [int(order[place]) for place in ahead[:3]]
        place = left.pop() if rng.integers(2) else max(left)
        left.discard(place)
        scanner.take(int(order[place]))


def test_a_gap_is_walked_once() -> None:
    """The head stays while everybody behind it leaves: each of many looks must not walk over all of them again."""
    scanner = DualScanner(np.arange(50_000), NOBODY)
    for request in range(49_998, 20_000, -1):
        scanner.take(request)
    for _ in range(20_000):  # 600 million places, walked one by one
        assert scanner.look_past_memory_end(1) == 20_000


def test_who_came_back_is_next_wherever_its_place_is() -> None:
    scanner = DualScanner(np.arange(6), NOBODY)
    scanner.take(5)
    scanner.peek_memory_end()
    assert scanner.distance(5, 6) == np.inf
    scanner.put_back(5, at_memory_end=True)
    assert scanner.distance(5, 6) == 0
    assert scanner.distance(2, 3) > 0

"""The rules of pacing, with times made up."""

from __future__ import annotations

import random

import pytest

from blendserve.engines.http.pacing import DOWN_AFTER, Pacer, RetrySettings
from blendserve.engines.http.replies import Failure

SETTINGS = RetrySettings(max_attempts=5, max_outage_s=100.0, backoff_s=1.0, max_backoff_s=8.0)
THROTTLED = Failure("http_429", "slow down", is_throttle=True, retry_after_s=10.0)
CUT = Failure("connection_error", "cut", is_outage=True)
REFUSED = Failure("connection_error", "refused", is_outage=True, is_unreachable=True)
BROKEN = Failure("http_500", "broken")


def pacer_of(max_sending: int = 64) -> Pacer:
    return Pacer(max_sending, SETTINGS, random.Random(1))


def fail(pacer: Pacer, request: int, failure: Failure, now_s: float, is_alone: bool = False) -> bool:
    pacer.begin(request)
    is_charged = pacer.failed(request, failure, now_s, now_s, is_alone=is_alone)
    pacer.end(request)
    return is_charged


def test_backoff_is_uniform_below_a_doubling_ceiling() -> None:
    pacer = pacer_of()
    for num_tries, ceiling in enumerate([1.0, 2.0, 4.0, 8.0, 8.0, 8.0]):
        delays = [pacer.delay_s(num_tries, CUT) for _ in range(400)]
        assert 0 <= min(delays) < 0.05 * ceiling
        assert 0.95 * ceiling < max(delays) <= ceiling
    assert min(pacer.delay_s(3, THROTTLED) for _ in range(400)) >= 10.0, "on top of what the server asked for"
    assert pacer.delay_s(10**6, CUT) <= 8.0


def test_a_throttled_server_is_left_alone_and_then_asked_less() -> None:
    pacer = pacer_of(64)
    assert not fail(pacer, 1, THROTTLED, 5.0)
    assert pacer.wait_s(5.0) == 10.0
    assert pacer.wait_s(14.0) == 1.0
    assert pacer.wait_s(15.0) == 0.0
    assert pacer.limit == 32
    pacer.failed(2, THROTTLED, 4.0, 6.0, is_alone=False)
    assert pacer.limit == 32, "requests sent before the cut say nothing new"
    for _ in range(32 * 40):
        pacer.answered(20.0)
    assert pacer.limit > 50


def test_while_others_get_through_only_the_throttled_request_waits() -> None:
    pacer = pacer_of()
    pacer.begin(1)
    pacer.answered(6.0)
    pacer.failed(1, THROTTLED, 5.0, 7.0, is_alone=False)
    pacer.end(1)
    assert pacer.wait_s(7.0) == 0.0


def test_a_request_throttled_alone_is_charged() -> None:
    assert fail(pacer_of(), 1, THROTTLED, 5.0, is_alone=True)


def test_a_request_that_fails_among_answers_is_charged() -> None:
    pacer = pacer_of()
    for now_s in range(20):
        assert fail(pacer, now_s, CUT, now_s)
        pacer.answered(now_s)
    assert not pacer.is_down
    assert not pacer.is_given_up(10_000.0)


def test_many_requests_that_fail_mean_an_outage_and_one_probe_at_a_time() -> None:
    pacer = pacer_of()
    charged = [fail(pacer, request, CUT, 1.0) for request in range(DOWN_AFTER)]
    assert charged == [True] * (DOWN_AFTER - 1) + [False]
    assert pacer.is_down
    now_s = 50.0
    assert pacer.wait_s(now_s) == 0.0
    pacer.begin(3)
    assert pacer.wait_s(now_s) is None, "a probe is on its way"
    assert pacer.failed(3, BROKEN, now_s, now_s, is_alone=False), "an error of its own is charged even then"
    pacer.end(3)
    pacer.begin(4)
    assert not pacer.failed(4, CUT, now_s, now_s, is_alone=False)
    pacer.end(4)
    pacer.answered(60.0)
    assert not pacer.is_down
    assert pacer.outage_s(60.0) == 0.0


def test_one_request_that_fails_again_and_again_is_no_outage() -> None:
    pacer = pacer_of()
    assert all(fail(pacer, 1, CUT, now_s) for now_s in range(50))
    assert not pacer.is_given_up(10_000.0)


def test_what_never_arrived_is_never_charged() -> None:
    pacer = pacer_of()
    assert not any(fail(pacer, 1, REFUSED, now_s) for now_s in range(50))
    assert pacer.is_down


@pytest.mark.parametrize("failure", [REFUSED, THROTTLED])
def test_a_server_is_given_up_after_the_longest_outage(failure: Failure) -> None:
    pacer = pacer_of()
    fail(pacer, 1, failure, 1000.0)
    assert not pacer.is_given_up(1080.0)
    fail(pacer, 2, failure, 1080.0)
    assert pacer.is_given_up(1101.0)
    pacer.answered(1102.0)
    assert not pacer.is_given_up(9999.0)


@pytest.mark.parametrize("is_throttle", [True, False])
def test_a_pause_longer_than_the_longest_outage_holds_nobody_else_up(is_throttle: bool) -> None:
    pacer = pacer_of()
    tomorrow = Failure("late", "tomorrow", is_throttle=is_throttle, is_outage=not is_throttle, retry_after_s=86_400.0)
    assert pacer.is_too_long(tomorrow)
    assert not pacer.is_too_long(THROTTLED)
    assert not any(fail(pacer, request, tomorrow, 0.0, is_alone=True) for request in range(2 * DOWN_AFTER))
    assert pacer.wait_s(0.0) == 0.0
    assert pacer.limit == 64
    assert not pacer.is_down
    assert not pacer.is_given_up(10_000.0)
    assert (pacer.num_throttled, pacer.num_failures) == ((16, 0) if is_throttle else (0, 16))


def test_no_more_than_the_limit_are_on_their_way() -> None:
    pacer = pacer_of(2)
    pacer.begin(1)
    assert pacer.wait_s(0.0) == 0.0
    pacer.begin(2)
    assert pacer.wait_s(0.0) is None
    pacer.end(1)
    assert pacer.wait_s(0.0) == 0.0

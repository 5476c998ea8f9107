"""When the next request may go to a server, and what a failure costs: no clock, no network, only the rules.

Three waits add up: a request's own backoff (exponential, full jitter), a pause that the server asked for (Retry-After),
and, while the server is down, one probe at a time. Throttled, the client halves the number of requests on their way and
regains it one by one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from blendserve.engines.http.replies import Failure

DOWN_AFTER = 8
"""So many different requests that fail with none answered between them mean that the server is down, not they bad."""


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """`max_attempts`: tries of one request that count against it. `max_outage_s`: how long the server may give no good
    answer before the run ends, and the longest Retry-After that is waited for. Backoff before try k is uniform in
    [0, min(`max_backoff_s`, `backoff_s` 2^k)].
    """

    max_attempts: int = 6
    max_outage_s: float = 600.0
    backoff_s: float = 0.5
    max_backoff_s: float = 60.0


class Pacer:
    """The health of one server as its replies tell it. Times come from the caller's monotonic clock.

    A failure is not charged to its request where the server is to blame: while it is down, where the request never
    got there, or where it was throttled among others. Errors of the server that concern the request (HTTP 500, a
    response that is no JSON) always are, so that a request which breaks the server ends as a row. A failure that is too
    long to wait for says nothing of the other requests: it is counted, and nothing else.
    """

    def __init__(self, max_sending: int, settings: RetrySettings, random_source: random.Random) -> None:
        self.num_sending = 0
        self.num_throttled = 0
        self.num_failures = 0
        self._max_sending = max_sending
        self._settings = settings
        self._random = random_source
        self._limit = float(max_sending)
        self._cut_at_s = float("-inf")
        self._paused_until_s = float("-inf")
        self._answered_at_s = float("-inf")
        self._failed: set[int] = set()
        self._silent_since_s: float | None = None
        self._num_probes = 0
        self._is_unreachable = False
        self._probe: int | None = None

    @property
    def is_down(self) -> bool:
        """Did nothing get through lately?"""
        return self._is_unreachable or len(self._failed) >= DOWN_AFTER

    @property
    def limit(self) -> int:
        """Requests that may be on their way at once."""
        return max(1, int(self._limit))

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until a request may be sent: 0 for now, None where it depends on those on their way."""
        if self.num_sending >= self.limit or (self.is_down and self._probe is not None):
            return None
        return max(0.0, self._paused_until_s - now_s)

    def begin(self, request: int) -> None:
        """A request is sent."""
        self.num_sending += 1
        if self.is_down and self._probe is None:
            self._probe = request

    def end(self, request: int) -> None:
        """It is not on its way any more, whatever came of it."""
        self.num_sending -= 1
        if self._probe == request:
            self._probe = None

    def answered(self, now_s: float) -> None:
        """The server gave an answer, a refusal perhaps: it is well."""
        self._answered_at_s = now_s
        self._failed.clear()
        self._is_unreachable = False
        self._silent_since_s = None
        self._num_probes = 0
        self._limit = min(self._max_sending, self._limit + 1 / self._limit)

    def failed(self, request: int, failure: Failure, sent_s: float, now_s: float, *, is_alone: bool) -> bool:
        """Count a failure, before its `end`. `is_alone`: no other request runs or waits. Returns: is it charged?"""
        if self.is_too_long(failure):
            self.num_throttled += failure.is_throttle
            self.num_failures += not failure.is_throttle
            return False
        if self._silent_since_s is None:
            self._silent_since_s = now_s
        if self._answered_at_s < sent_s:  # else others get through: only this one waits
            self._pause(now_s + (failure.retry_after_s or 0.0))
        if failure.is_throttle:
            self.num_throttled += 1
            self._failed.clear()
            self._is_unreachable = False
            self._slow_down(sent_s, now_s)
            return is_alone  # and still too much: it is this request
        self.num_failures += 1
        was_down = self.is_down
        self._failed.add(request)
        self._is_unreachable |= failure.is_unreachable
        if self.is_down and (request == self._probe or not was_down):
            self._pause(now_s + self._backoff_s(self._num_probes))
            self._num_probes += 1
        if failure.is_outage:
            return not (self.is_down or failure.is_unreachable)
        return True

    def is_too_long(self, failure: Failure) -> bool:
        """Does the server want to be left alone for longer than is worth waiting?"""
        return (failure.retry_after_s or 0.0) > self._settings.max_outage_s

    def outage_s(self, now_s: float) -> float:
        """How long the server has given no answer although it was asked; 0 while it is well."""
        return 0.0 if self._silent_since_s is None else max(now_s, self._paused_until_s) - self._silent_since_s

    def is_given_up(self, now_s: float) -> bool:
        """Has it been down, or throttled everything, for longer than is worth waiting?"""
        is_blocked = self.is_down or not self._failed
        return is_blocked and self.outage_s(now_s) > self._settings.max_outage_s

    def delay_s(self, num_attempts: int, failure: Failure) -> float:
        """How long a request that failed so often waits: what the server asked for, and its backoff on top."""
        return (failure.retry_after_s or 0.0) + self._backoff_s(num_attempts)

    def _pause(self, until_s: float) -> None:
        self._paused_until_s = max(self._paused_until_s, until_s)

    def _backoff_s(self, num_attempts: int) -> float:
        ceiling = self._settings.backoff_s * 2 ** min(num_attempts, 30)
        return self._random.uniform(0.0, min(self._settings.max_backoff_s, ceiling))

    def _slow_down(self, sent_s: float, now_s: float) -> None:
        """Halve the limit, once for all requests that were on their way together."""
        if sent_s >= self._cut_at_s:
            self._limit = max(1.0, self._limit / 2)
            self._cut_at_s = now_s

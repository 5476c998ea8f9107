"""Progress of a run while it runs: one live line on a terminal, a plain line now and then elsewhere.

A thread of its own reads the engine's counters, so that a step that takes long or ends nothing still shows life. Where
nobody can be shown anything any more (a pipe that was closed), a run goes on unseen.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

TERMINAL_INTERVAL_S = 0.5
PLAIN_INTERVAL_S = 10.0
START_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A moment of a run. Tokens are computed ones of this run; `num_expected_tokens` are likely left.

    `kv_use` is None where it is not known, as of replicas; `unit` is what `num_running` counts.
    """

    num_done: int
    num_requests: int
    num_tokens: int
    num_expected_tokens: float
    num_running: int
    kv_use: float | None
    prefix_hit_rate: float
    unit: str = "running"


class Progress:
    """Shows snapshots from `read` between `__enter__` and `__exit__`, from the first that is not None on; nothing
    where `is_quiet`."""

    def __init__(
        self,
        read: Callable[[], Snapshot | None],
        *,
        is_quiet: bool = False,
        file: TextIO | None = None,
        noun: str = "requests",
    ) -> None:
        self._read = read
        self._noun = noun
        self._file = file or sys.stderr
        self._is_quiet = is_quiet
        self._is_terminal = self._file.isatty()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._started_s: float | None = None
        self._last = (0.0, 0)
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Self:
        if not self._is_quiet:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_quiet:
            return
        self._stop.set()
        self._thread.join()
        self._show()
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()

    def _watch(self) -> None:
        while self._started_s is None:
            if (snapshot := self._read()) is not None:
                self._begin(snapshot)
            elif self._stop.wait(START_INTERVAL_S):
                return
        interval_s = TERMINAL_INTERVAL_S if self._is_terminal else PLAIN_INTERVAL_S
        while not self._stop.wait(interval_s):
            self._show()

    def _begin(self, snapshot: Snapshot) -> None:
        self._started_s = time.monotonic()
        self._last = (self._started_s, snapshot.num_tokens)
        if self._is_terminal:
            with suppress(OSError):
                self._bar = tqdm(
                    total=snapshot.num_requests,
                    file=self._file,
                    dynamic_ncols=True,
                    unit="req",
                    bar_format=f"{{percentage:3.0f}}%|{{bar}}| {{n}}/{{total}} {self._noun}, {{postfix}}",
                )

    def _show(self) -> None:
        snapshot = self._read()
        if snapshot is None:
            return
        if self._started_s is None:
            self._begin(snapshot)
        text = self._describe(snapshot)
        with suppress(OSError):
            if self._bar is None:
                print(f"{snapshot.num_done}/{snapshot.num_requests} {self._noun}, {text}", file=self._file, flush=True)
                return
            self._bar.n = snapshot.num_done
            self._bar.set_postfix_str(text, refresh=True)

    def _describe(self, snapshot: Snapshot) -> str:
        now = time.monotonic()
        before_s, before_tokens = self._last
        rate = (snapshot.num_tokens - before_tokens) / max(now - before_s, 1e-9)
        self._last = (now, snapshot.num_tokens)
        mean_rate = snapshot.num_tokens / max(now - (self._started_s or now), 1e-9)
        left_s = snapshot.num_expected_tokens / mean_rate if mean_rate > 0 else None
        kv_use = "" if snapshot.kv_use is None else f"KV {snapshot.kv_use:.0%}, "
        return (
            f"{rate:.0f} tok/s, ETA {format_seconds(left_s)}, {snapshot.num_running} {snapshot.unit}, "
            f"{kv_use}prefix hits {snapshot.prefix_hit_rate:.0%}"
        )


def format_seconds(seconds: float | None) -> str:
    """A duration as people read it: 42s, 3m05s, 2h07m; a question mark where it is not known."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"

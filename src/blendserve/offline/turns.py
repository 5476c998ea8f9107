"""Who may use the engine of an `LLM` now: one thread at a time, of the process that opened it, until it is closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blendserve.errors import ConfigError


class Turns:
    """Made by the process that opens the engine."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._is_closed = False

    @property
    def is_ours(self) -> bool:
        """Does the engine run in this process? In one that was forked from its own the lock may be held for ever."""
        return self._owner == os.getpid()

    def check_open(self) -> None:
        """Raises: ConfigError when the engine cannot answer any more, or not here."""
        if self._is_closed:
            raise ConfigError("this LLM is closed; make a new one")
        if not self.is_ours:
            raise ConfigError(
                f"this LLM was opened by process {self._owner}, and this process ({os.getpid()}) was forked from it "
                "without its threads; make a new LLM here, or start processes with the method spawn"
            )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep other threads out. Raises: as `check_open`."""
        self.check_open()
        with self._lock:
            self.check_open()
            yield

    def finish(self, last: Callable[[], None]) -> None:
        """Do something last, once other threads have had their turns, and refuse all that come later; nothing in a
        process that was forked."""
        if self.is_ours:
            with self._lock:
                self._is_closed = True
                last()

    def release(self, stop: Callable[[], None]) -> None:
        """Give up what a turn began; nothing in a process that was forked."""
        if self.is_ours:
            with self._lock:
                stop()

"""Ctrl-C and SIGTERM: how they reach a job, and what an engine still has at hand when they do."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from blendserve.request import SequenceOutput


class JobInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a job. Finished answers are kept, and the message says how to go on.

    `exit_code` is for the shell: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(KeyboardInterrupt):
    """SIGTERM, as it travels through the engine."""


def left_of(outputs: Iterator[SequenceOutput], interrupt: KeyboardInterrupt) -> Iterator[SequenceOutput]:
    """What an engine has at hand when it is told of an interrupt that struck elsewhere."""
    if not isinstance(outputs, Generator):
        return
    with suppress(KeyboardInterrupt, StopIteration):
        output: SequenceOutput = outputs.throw(interrupt)
        while True:
            yield output
            output = next(outputs)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end a job as Ctrl-C does. Signals reach only the main thread; elsewhere this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Ctrl-C and the signals that end a job: how they reach it, and what an engine still has at hand when they do."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from blendserve.request import SequenceOutput


class JobInterrupted(KeyboardInterrupt):
    """Ctrl-C or one of `END_SIGNALS` stopped a job. Finished answers are kept, and the message says how to go on.

    `exit_code` is for the shell: 130 after Ctrl-C, 128 and the number of the signal otherwise (143 after SIGTERM).
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


END_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What ends a job in good order: systems that stop it, a terminal that closes, Slurm before the time is up."""


class Terminated(KeyboardInterrupt):
    """One of `END_SIGNALS`, as it travels through the engine."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


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
    """Let `END_SIGNALS` end a job as Ctrl-C does, but for those that are ignored, as under nohup. Signals reach only
    the main thread; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise Terminated(signum)

    heard = [number for number in END_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, terminate) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

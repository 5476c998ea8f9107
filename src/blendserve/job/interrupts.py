"""Ctrl-C and the signals that end a job: how they reach it, and what an engine still has at hand when they do."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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


@dataclass(slots=True)
class Heard:
    """The signal that ended a job, if it was one of `END_SIGNALS`. What travels through the engine does not tell: Ray
    raises a KeyboardInterrupt of its own in the place of the one that it meets.
    """

    number: int = signal.SIGINT

    @property
    def exit_code(self) -> int:
        return 128 + self.number


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
def terminable() -> Iterator[Heard]:
    """Let `END_SIGNALS` end a job as Ctrl-C does, but for those that are ignored, as under nohup. Signals reach only
    the main thread; elsewhere this does nothing.
    """
    heard = Heard()
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return

    def terminate(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        heard.number = signum
        raise KeyboardInterrupt

    listened = [number for number in END_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, terminate) for number in listened}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Children of a test that are made to die."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

FINISHED, DISK_FULL, BROKEN = 0, 28, 99


def in_child(work: Callable[[], int]) -> int:
    """Run `work` in a forked child; returns the child's process id. Nothing of the test's own runs there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; the child starts none
        child = os.fork()
    if child:
        return child
    try:
        os._exit(work())
    finally:
        os._exit(BROKEN)


def exit_code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

"""The API gives way to the engine. A poll then waits for a gap, instead of stopping a core in the middle of a step, for
which the other cores would wait too. Linux; nothing happens elsewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

NICENESS = 5


def give_way() -> None:
    """Lower the priority of this thread, and of the threads that it starts from now on."""
    if sys.platform == "linux":
        with suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS))


class Spawner:
    """Starts processes with the priority that the thread had which made it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "spawn")
        self._thread.submit(threading.get_native_id).result()  # the thread begins now, with today's priority

    def start(self, command: list[str], descriptor: int) -> subprocess.Popen[bytes]:
        """A process that keeps one file descriptor, and leads a group of all that it starts."""

        def begin() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, process_group=0)

        return self._thread.submit(begin).result()

    def close(self) -> None:
        self._thread.shutdown()

"""The engine process as the service sees it: started for a model, spoken to, heard from, and found dead.

What comes from it is handed to the event loop; nothing here waits for the engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from blendserve.serve.messages import Command, Open, Report
from blendserve.serve.priority import Spawner
from blendserve.serve.settings import ModelChoice

_END_S = 5.0


@dataclass(frozen=True, slots=True)
class Died:
    """The engine process is gone. `number` tells which of all that were started."""

    number: int
    exit_code: int


def end_group(leader: int) -> None:
    """Kill an engine process and all that it has started, such as vLLM's own processes, which else would stay."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def end_leftovers(leader: int) -> None:
    """Kill what an engine process has started, where it is dead itself. Its number stays taken while they live."""
    if leader <= 1:
        return
    try:
        os.kill(leader, 0)
    except ProcessLookupError:
        end_group(leader)
    except PermissionError:
        pass


def _bury(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of an engine process, and end what it has left. Such a child may hold the connection open."""
    process.wait()
    end_group(process.pid)


Hear = Callable[[int, Report | Died], None]
"""Is called in the event loop with the number of the process that speaks."""


class EngineHost:
    """At most one engine process at a time."""

    def __init__(self, lock_path: Path, hear: Hear) -> None:
        self.model: ModelChoice | None = None
        self.number = 0
        self._lock_path = lock_path
        self._hear = hear
        self._spawner = Spawner()
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self, model: ModelChoice) -> None:
        """Start a process for a model. There must be none."""
        assert self._process is None, "one engine process at a time"
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "blendserve.serve.engine_process", str(theirs.fileno())]
            self._process = self._spawner.start(command, theirs.fileno())
        self.number += 1
        self.model = model
        self._connection = Connection(ours.detach())
        listening = (self._process, self._connection, self.number)
        threading.Thread(target=self._listen, args=listening, name="engine-host", daemon=True).start()
        threading.Thread(target=_bury, args=(self._process,), name="engine-end", daemon=True).start()
        self.send(Open(model, self._lock_path))

    def send(self, command: Command) -> None:
        """Tell the process something; lost where it is dead, which is heard of otherwise."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.send(command)

    def kill(self) -> None:
        """End the process at once. `Died` follows."""
        if self._process is not None:
            end_group(self._process.pid)

    async def close(self) -> None:
        """End the process in good order, or at once if it takes too long."""
        self._spawner.close()
        process = self._process
        if process is None:
            return
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, _END_S)
        end_group(process.pid)
        await asyncio.to_thread(process.wait)

    def forget(self) -> None:
        """The process is dead: another one may be started."""
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = self.model = None

    def _listen(self, process: subprocess.Popen[bytes], connection: Connection, number: int) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._tell(number, connection.recv())
        _bury(process)
        self._tell(number, Died(number, process.wait()))

    def _tell(self, number: int, report: Report | Died) -> None:
        with suppress(RuntimeError):  # the loop is closed: the service has ended
            self._loop.call_soon_threadsafe(self._hear, number, report)

"""The race's side of a worker: starts its process, sends one job at a time, reads the reply.

The other side is `peers/worker_loop.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from peer_lineup import Entrant


class PeerError(Exception):
    """A peer that could not start or answer; the race goes on without it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One job's cost. `cpu_s` is of the worker's own threads."""

    elapsed_s: float
    cpu_s: float
    num_output_tokens: int


class PeerProcess:
    """A running worker with its engine loaded. Raises: PeerError from any method."""

    def __init__(self, entrant: Entrant, question: Sequence[int], max_answer_tokens: int, timeout_s: float) -> None:
        self.name = entrant.name
        self._timeout_s = timeout_s
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # lives as long as the process
        settings = {"engine": entrant.settings, "question": list(question), "max_answer_tokens": max_answer_tokens}
        self._process = subprocess.Popen(
            [*entrant.command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **entrant.environment},
            text=True,
        )
        try:
            self.description: dict[str, Any] = self._reply()
        except PeerError:
            self.close()
            raise

    def run(self, prompts: Sequence[Sequence[int]], num_output_tokens: Sequence[int]) -> Run:
        """Run one job. Raises: PeerError when the engine made another number of tokens than it was asked for."""
        reply = self._asked({"prompts": prompts, "num_output_tokens": num_output_tokens})
        if reply["num_output_tokens"] != list(num_output_tokens):
            raise self._failure(f"made {reply['num_output_tokens'][:8]}... tokens, not {num_output_tokens[:8]}...")
        return Run(reply["elapsed_s"], reply["cpu_s"], sum(reply["num_output_tokens"]))

    def run_constrained(
        self, prompts: Sequence[Sequence[int]], schemas: Sequence[str], max_tokens: int
    ) -> tuple[Run, list[int]]:
        """Run one job whose answers follow a JSON schema each. Returns the tokens of each answer beside its cost."""
        reply = self._asked({"prompts": prompts, "schemas": schemas, "max_tokens": max_tokens})
        made: list[int] = reply["num_output_tokens"]
        return Run(reply["elapsed_s"], reply["cpu_s"], sum(made)), made

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # a job that the worker did not live to read
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _asked(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("ended") from None
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(self._timeout_s):
                raise self._failure(f"gave no answer in {self._timeout_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failure("ended")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _failure(self, what: str) -> PeerError:
        self._stderr.seek(0)
        last_lines = "\n".join(self._stderr.read().splitlines()[-8:])
        return PeerError(f"{self.name} {what}; its last words:\n{last_lines}")

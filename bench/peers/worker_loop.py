"""A worker of the peers' race: loads one engine, then answers jobs that arrive line by line.

Runs in the peer's own environment, so: standard library only. Settings come as JSON in the first argument, jobs as JSON
lines on stdin, replies leave as JSON lines on the original stdout (what the engine itself prints goes to stderr).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable


class Engine(Protocol):
    def describe(self) -> dict[str, str]:
        """`version`, `precision` and `settings`, for the table."""

    def generate(self, prompts: list[list[int]], num_output_tokens: list[int]) -> list[int]:
        """Greedy, end of sequence ignored; returns the number of tokens made for each prompt."""

    def answer(self, prompt: list[int], max_tokens: int) -> str:
        """Greedy text for one prompt: shows that the weights were read as meant."""


@runtime_checkable
class Constrained(Protocol):
    """What bench/structured.py asks for besides."""

    def constrained(self, prompts: list[list[int]], schemas: list[str], max_tokens: int) -> list[int]:
        """Greedy, each held to its JSON schema; returns the number of tokens made for each prompt."""


def serve(load: Callable[[dict[str, Any]], Engine]) -> None:
    """Answer jobs until stdin ends. `load` gets the settings and returns the engine."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    settings = json.loads(sys.argv[1])
    started = time.perf_counter()
    engine = load(settings["engine"])
    loaded = time.perf_counter()
    answer = engine.answer(settings["question"], settings["max_answer_tokens"])
    reply({"load_s": loaded - started, "answer": answer, **engine.describe()})
    for line in sys.stdin:
        job = json.loads(line)
        reply(_run(engine, job))


def _run(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    cpu_before = _cpu_s()
    started = time.perf_counter()
    if "schemas" in job:
        assert isinstance(engine, Constrained), "this engine has no structured outputs here"
        made = engine.constrained(job["prompts"], job["schemas"], job["max_tokens"])
    else:
        made = engine.generate(job["prompts"], job["num_output_tokens"])
    elapsed_s = time.perf_counter() - started
    return {"elapsed_s": elapsed_s, "cpu_s": _cpu_s() - cpu_before, "num_output_tokens": made}


def _cpu_s() -> float:
    """CPU seconds of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

"""The engine process's rounds, in this process, over an engine of hashes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from batch_fakes import SERVED, FakeCodec, answer
from serve_cases import CHAT, lines

from blendserve.engines.base import Engine, EngineTimes
from blendserve.job.pending import PendingRequests
from blendserve.job.reader import ReadLimits
from blendserve.request import SequenceOutput
from blendserve.serve.engine_process import EngineWorker, served_as
from blendserve.serve.messages import BatchDone, BatchSpec, Release, Released, Report, RoundEnded, RunRound, Share


class DeafEngine:
    """Like replicas, it looks requests up where nobody hears of what is withdrawn."""

    settings: ClassVar[Mapping[str, Any]] = {}
    served, codec, identity, capacity_bytes = SERVED, FakeCodec(), "fake", 0
    notes, times, stats = (), EngineTimes(run_s=1.5), None

    def __init__(self, on_answer: Callable[[int], None]) -> None:
        self.num_answers = 0
        self._on_answer = on_answer

    def status(self) -> None:
        return None

    def generate(self, pending: PendingRequests, policy: str) -> Iterator[SequenceOutput]:  # noqa: ARG002
        for row in range(len(pending)):
            self._on_answer(self.num_answers)
            self.num_answers += 1
            yield answer(PendingRequests.__getitem__(pending, row))


def share(directory: Path, id: str, count: int) -> Share:
    source = directory / f"{id}.jsonl"
    source.write_bytes(lines(count, id))
    return Share(BatchSpec(id, source, id, directory / id, CHAT, 1, ReadLimits()))


def run_round(engine: DeafEngine, shares: list[Share], made: list[EngineWorker]) -> list[Report]:
    ours, theirs = Pipe()
    worker = EngineWorker(cast(Any, theirs), cast(Engine, engine), served_as(cast(Engine, engine), "m", ()))
    made.append(worker)
    heard: list[Report] = []
    listening = threading.Thread(target=lambda: heard.extend(iter(ours.recv, None)), daemon=True)
    listening.start()
    worker._run_round(RunRound(1, tuple(shares), "fcfs"))
    theirs.send(None)
    listening.join(10)
    return heard


def test_a_round_whose_batches_are_all_withdrawn_ends(tmp_path: Path) -> None:
    made: list[EngineWorker] = []
    engine = DeafEngine(lambda count: made[0].hear(Release("a")) if count == 3 else None)
    heard = run_round(engine, [share(tmp_path, "a", 50)], made)
    assert engine.num_answers <= 5
    assert Released("a") in heard
    assert isinstance(heard[-1], RoundEnded)
    assert heard[-1].error is None


def test_a_batch_that_is_withdrawn_takes_no_other_along(tmp_path: Path) -> None:
    made: list[EngineWorker] = []
    engine = DeafEngine(lambda count: made[0].hear(Release("a")) if count == 3 else None)
    heard = run_round(engine, [share(tmp_path, "a", 10), share(tmp_path, "b", 10)], made)
    assert engine.num_answers == 20
    assert Released("a") in heard
    assert [report for report in heard if isinstance(report, BatchDone)] == [BatchDone("b")]
    assert heard[-1] == RoundEnded(1, 13, run_s=1.5)

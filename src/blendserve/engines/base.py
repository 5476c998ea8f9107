"""The seam between a job and who answers it: one protocol for every engine, and what may be told of it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from blendserve.dialect.endpoint import Codec
from blendserve.dialect.schema import ServedModel
from blendserve.engine.front import Front
from blendserve.engine.stats import RunStats
from blendserve.engines.native.measured import MeasuredRun
from blendserve.executors.trace import StepTrace
from blendserve.job.pending import PendingRequests
from blendserve.planner.plan import Plan
from blendserve.request import SequenceOutput

Notify = Callable[[str], None]
"""Is told one line at a time what a person at the terminal should know now."""


class EngineTimes(NamedTuple):
    """Where the time of the latest `generate` went. Units: seconds."""

    load_s: float = 0.0
    plan_s: float = 0.0
    run_s: float = 0.0
    calibrate_s: float = 0.0


class EngineStatus(NamedTuple):
    """A moment of a run. `num_expected_tokens` are those of the whole run; `num_tokens` are computed by now, None where
    only the job's count of answers tells. `kv_use` and `prefix_hit_rate` are None where the engine does not know them;
    `unit` is what `num_running` counts.
    """

    num_running: int
    num_expected_tokens: float
    num_tokens: int | None = None
    kv_use: float | None = None
    prefix_hit_rate: float | None = None
    unit: str = "running"


class Engine(Protocol):
    """One engine for one job after the other. `generate` is called only when requests are left, by a replica for every
    part that it is given; what it loads stays until `close`. `times` and `stats` are of the latest call.

    `identity` and `settings` name all that answers depend on beside the input. `capacity_bytes` is the KV memory that
    was asked for, on which errors for want of memory depend; 0 where it was left open. `plan` is the order of requests
    as one such engine sees it, from which replicas get their parts. `status` is None until requests run. `notes` are
    sentences that the user should read at the end.
    """

    @property
    def served(self) -> ServedModel: ...
    @property
    def codec(self) -> Codec: ...
    @property
    def identity(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def capacity_bytes(self) -> int: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def times(self) -> EngineTimes: ...
    @property
    def stats(self) -> RunStats | None: ...
    def status(self) -> EngineStatus | None: ...
    def plan(self, pending: PendingRequests) -> Plan: ...
    def generate(self, pending: PendingRequests, policy: str) -> Iterator[SequenceOutput]: ...
    def close(self) -> None: ...


@runtime_checkable
class FrontedEngine(Protocol):
    """An engine that takes single requests ahead of what it runs. `answer_front` answers those of `front` while nothing
    else runs.
    """

    front: Front | None

    def answer_front(self) -> None: ...


class RunObserver(Protocol):
    """Watches a run on the native engine step by step. `source` names what runs; `run_ended` is called once, when a run
    has ended or was interrupted, and returns sentences for the user.
    """

    @property
    def source(self) -> str: ...
    @property
    def trace(self) -> StepTrace: ...
    def run_ended(self, run: MeasuredRun) -> tuple[str, ...]: ...

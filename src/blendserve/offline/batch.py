"""`run_batch`: a batch file answered on any engine. The `run` command calls it too."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from blendserve.engines.base import Engine
from blendserve.engines.opening import open_engine
from blendserve.engines.settings import (
    EngineSettings,
    HttpSettings,
    NativeSettings,
    ReplicaSettings,
    VllmSettings,
)
from blendserve.errors import ConfigError
from blendserve.job.job import BatchJob, JobProgress, JobReport
from blendserve.job.reader import DEFAULT_LIMITS, ReadLimits
from blendserve.job.run import run_job
from blendserve.planner.policies import POLICY_NAMES

DEFAULT_POLICY = "blend"
_NATIVE = NativeSettings()


def run_batch(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    errors: str | os.PathLike[str] | None = None,
    engine: EngineSettings | Engine = _NATIVE,
    policy: str = DEFAULT_POLICY,
    ordered: bool = False,
    fresh: bool = False,
    limits: ReadLimits = DEFAULT_LIMITS,
    on_progress: Callable[[JobProgress], None] | None = None,
) -> JobReport:
    """Answer every line of the OpenAI Batch file `input`, and write the answers to `output`.

    - `errors`: the file for lines that cannot be answered. None: OUT.errors.jsonl beside OUT.jsonl. Without such lines
      there is no file.
    - `engine`: settings, from which an engine is opened and closed again (default: the native engine with the default
      model); or an open engine, which stays open.
    - `policy`: the order in which requests run (default: "blend"). It changes the time, never the answers of the native
      engine.
    - `ordered`: write answers in the order of the input (default: in the order in which they finish).
    - `fresh`: discard what an earlier run of this job has finished (default: go on where it stopped).
    - `limits`: how much the file and each of its lines may ask for (default: that of `ReadLimits`).
    - `on_progress`: called at the beginning and after every answer, always with the same object, which is updated.

    Finished answers are kept in the directory `OUT.jsonl.journal`: the same call goes on where an earlier one stopped.
    Raises: ConfigError, before any work, when a path, the input, the settings or the journal do not allow the job;
    CapacityError when the disk is full; ExecutorError when the engine fails; JobInterrupted on Ctrl-C, SIGTERM, SIGHUP
    or SIGUSR1. Whatever is raised, finished answers are kept.
    """
    if policy not in POLICY_NAMES:
        raise ConfigError(f"unknown policy {policy!r}; known: {', '.join(POLICY_NAMES)}")
    if not isinstance(engine, NativeSettings | VllmSettings | HttpSettings | ReplicaSettings):
        job = BatchJob(
            input_path=Path(input),
            output_path=Path(output),
            served=engine.served,
            model_identity=engine.identity,
            settings=engine.settings,
            errors_path=Path(errors) if errors is not None else None,
            is_ordered=ordered,
            is_fresh=fresh,
            limits=limits,
            capacity=engine.capacity_bytes,
        )
        report = run_job(job, engine.codec, lambda pending: engine.generate(pending, policy), on_progress=on_progress)
        return replace(report, notes=(*report.notes, *engine.notes))
    with closing(open_engine(engine)) as opened:
        return run_batch(
            input,
            output,
            errors=errors,
            engine=opened,
            policy=policy,
            ordered=ordered,
            fresh=fresh,
            limits=limits,
            on_progress=on_progress,
        )

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
from blendserve.job.job import BatchJob, JobProgress, JobReport, run_job
from blendserve.job.reader import DEFAULT_LIMITS, ReadLimits
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
    """Answer every line of an OpenAI Batch file and write the answers to `output`.

    Lines that cannot be answered become rows of `errors`; None is a file beside the output, which is made only where
    there are such lines. Finished work is journalled beside the output: the same call goes on where an earlier one
    stopped, and `fresh` discards what that one has finished. `ordered` writes answers in the order of the input, else
    they stand as they finish. `policy` is the order in which requests run; it changes the time, never the answers of
    the native engine. `engine` is settings, from which an engine is opened and closed again, or an engine that is open
    and stays so. `limits` bounds what the file may ask for. `on_progress` is called at the beginning and after every
    answer, with one object that is updated.
    Raises: ConfigError before any work when a path, the input, the settings or the journal does not allow it;
    CapacityError when the disk is full; ExecutorError when the engine fails; JobInterrupted, a KeyboardInterrupt. What
    had finished by then is kept.
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

"""`run_batch` and `run_batches`: batch files answered on any engine. The `run` command calls them too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
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
from blendserve.job.places import JobFiles, RunOptions, choose_outputs, find_inputs
from blendserve.job.reader import DEFAULT_LIMITS, ReadLimits
from blendserve.job.run import run_jobs
from blendserve.offline.urls import staged_job
from blendserve.planner.policies import POLICY_NAMES

DEFAULT_POLICY = "blend"
_NATIVE = NativeSettings()


def run_batch(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    errors: str | os.PathLike[str] | None = None,
    engine: EngineSettings | Engine = _NATIVE,
    policy: str = DEFAULT_POLICY,
    ordered: bool = False,
    fresh: bool = False,
    retry_failed: bool = False,
    reuse: bool = False,
    limits: ReadLimits = DEFAULT_LIMITS,
    journal: str | os.PathLike[str] | None = None,
    on_progress: Callable[[JobProgress], None] | None = None,
    on_answer: Callable[[bytes], None] | None = None,
) -> JobReport:
    """Answer every line of the OpenAI Batch file `input`, and write the answers to `output`.

    - `output`: the file for answers. None: IN.out.jsonl beside IN.jsonl.
    - `errors`: the file for lines that cannot be answered. None: OUT.errors.jsonl beside OUT.jsonl. Without such lines
      there is no file.
    - `engine`: settings, from which an engine is opened and closed again (default: the native engine with the default
      model); or an open engine, which stays open.
    - `policy`: the order in which requests run (default: "blend"). It changes the time, never the answers of the native
      engine.
    - `ordered`: write answers in the order of the input (default: in the order in which they finish).
    - `fresh`: discard what an earlier run of this job has finished (default: go on where it stopped).
    - `retry_failed`: try lines again that failed for a reason that may pass: a failure of the engine or the server, a
      timeout, too little memory (default: keep their error rows).
    - `reuse`: where the input has changed since the job began, keep the answers to lines that have not, and run the
      others (default: refuse).
    - `limits`: how much the file and each of its lines may ask for (default: that of `ReadLimits`).
    - `journal`: where `input`, `output` or `errors` are URLs, such as "s3://bucket/in.jsonl": a directory of this
      machine for their copies and the journal. None: all are files of this machine.
    - `on_progress`: called at the beginning and after every answer, always with the same object, which is updated.
    - `on_answer`: called with every row of the output, as bytes, when it is recorded; those of earlier runs come first.

    Finished answers are kept in the directory `OUT.jsonl.journal`: the same call goes on where an earlier one stopped.
    Raises: ConfigError, before any work, when a path, the input, the settings or the journal do not allow the job;
    CapacityError when the disk is full; ExecutorError when the engine fails; JobInterrupted on Ctrl-C, SIGTERM, SIGHUP
    or SIGUSR1. Whatever is raised, finished answers are kept.
    """
    named_output, named_errors = (None if path is None else os.fspath(path) for path in (output, errors))
    kept = None if journal is None else Path(journal)
    staged = staged_job([os.fspath(input)], named_output, named_errors, kept, is_fresh=fresh)
    job = _files_of(input, output, errors) if staged is None else staged.files
    options = RunOptions(ordered, fresh, retry_failed, reuse, limits)
    (report,) = run_files(
        [job], engine=engine, policy=policy, options=options, on_progress=on_progress, on_answer=on_answer
    )
    return report if staged is None else staged.publish(report)


def _files_of(
    input: str | os.PathLike[str], output: str | os.PathLike[str] | None, errors: str | os.PathLike[str] | None
) -> JobFiles:
    source = Path(input)
    (target,) = choose_outputs([source], None if output is None else Path(output))
    return JobFiles(source, target, None if errors is None else Path(errors))


def run_batches(
    inputs: Sequence[str | os.PathLike[str]],
    output_directory: str | os.PathLike[str] | None = None,
    *,
    engine: EngineSettings | Engine = _NATIVE,
    policy: str = DEFAULT_POLICY,
    ordered: bool = False,
    fresh: bool = False,
    retry_failed: bool = False,
    reuse: bool = False,
    limits: ReadLimits = DEFAULT_LIMITS,
    on_progress: Callable[[JobProgress], None] | None = None,
) -> list[JobReport]:
    """Answer several batch files as one plan: the model is loaded once, and beginnings that prompts of different files
    share are computed once. Every file gets the answers that it would get alone. Returns: a report for every file.

    - `inputs`: files, and directories that stand for the batch files in them.
    - `output_directory`: where IN.out.jsonl goes for IN.jsonl. None: beside each input.

    Other arguments, and what is raised: as `run_batch`.
    """
    sources = find_inputs([Path(path) for path in inputs])
    directory = None if output_directory is None else Path(output_directory)
    targets = choose_outputs(sources, directory, is_directory=directory is not None)
    jobs = [JobFiles(source, target) for source, target in zip(sources, targets, strict=True)]
    options = RunOptions(ordered, fresh, retry_failed, reuse, limits)
    return run_files(jobs, engine=engine, policy=policy, options=options, on_progress=on_progress)


def run_files(
    files: Sequence[JobFiles],
    *,
    engine: EngineSettings | Engine,
    policy: str,
    options: RunOptions,
    on_progress: Callable[[JobProgress], None] | None = None,
    on_answer: Callable[[bytes], None] | None = None,
) -> list[JobReport]:
    """What `run_batch` and `run_batches` have in common: jobs whose places are fixed, run as one plan."""
    if policy not in POLICY_NAMES:
        raise ConfigError(f"unknown policy {policy!r}; known: {', '.join(POLICY_NAMES)}")
    with _opened(engine) as opened:
        jobs = [
            BatchJob(
                input_path=of_job.input,
                output_path=of_job.output,
                served=opened.served,
                model_identity=opened.identity,
                settings=opened.settings,
                errors_path=of_job.errors,
                capacity=opened.capacity_bytes,
                **options._asdict(),
            )
            for of_job in files
        ]
        reports = run_jobs(
            jobs,
            opened.codec,
            lambda pending: opened.generate(pending, policy),
            on_progress=on_progress,
            on_answer=on_answer,
        )
        return [replace(report, notes=(*report.notes, *opened.notes)) for report in reports]


@contextmanager
def _opened(engine: EngineSettings | Engine) -> Iterator[Engine]:
    """An engine that is open already stays open."""
    if not isinstance(engine, NativeSettings | VllmSettings | HttpSettings | ReplicaSettings):
        yield engine
        return
    with closing(open_engine(engine)) as opened:
        yield opened

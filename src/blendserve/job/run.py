"""Batch jobs from file to files, crash-safe: read, answer what is not answered yet, record, write.

The engine comes in as a function from pending requests to outputs, called only when something is left to run: a rerun
of a finished job loads no model. Several jobs run as one: their requests are planned together, and every answer goes to
its own job. Killed at any moment, the same command goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

from blendserve.dialect.endpoint import Codec
from blendserve.job.attempt import Attempt
from blendserve.job.door import BatchFile, Door
from blendserve.job.interrupts import Heard, JobInterrupted, left_of, terminable
from blendserve.job.job import BatchJob, JobProgress, JobReport
from blendserve.job.joined import join_pending
from blendserve.job.pending import PendingRequests
from blendserve.job.windows import MAX_PLANNED_REQUESTS, windows_of
from blendserve.job.writer import check_jobs_apart
from blendserve.planner.base import Int64s
from blendserve.request import SequenceOutput

Generate = Callable[[PendingRequests], Iterator[SequenceOutput]]
"""Runs requests in any order; `SequenceOutput.index` is the row of the pending requests."""

OnProgress = Callable[[JobProgress], None]


def _ignore(_: JobProgress) -> None:
    """Tell nobody."""


def run_job(
    job: BatchJob,
    codec: Codec,
    generate: Generate,
    *,
    door: Door | None = None,
    on_progress: OnProgress | None = None,
    on_answer: Callable[[bytes], None] | None = None,
    clock: Callable[[], float] = time.time,
    max_planned: int | None = MAX_PLANNED_REQUESTS,
) -> JobReport:
    """Run a batch job to its end, or to the end of one that was interrupted. `door`: where lines come from and rows go;
    None: the files that the job names. `max_planned`: `generate` is called for so many requests at a time; None: for
    all at once.

    `on_answer` is told every row of the output as it is recorded, those of earlier runs first.
    Raises: ConfigError before any work when a path, the input or the journal does not allow it; CapacityError when the
    disk is full; ExecutorError when the engine fails; JobInterrupted. Whatever is raised later, finished work is kept.
    """
    with Attempt(job, codec, door or _file_of(job), clock, on_answer) as attempt:
        (report,) = _Joint([attempt], on_progress or _ignore, max_planned).run(generate)
    return report


def run_jobs(
    jobs: Sequence[BatchJob],
    codec: Codec,
    generate: Generate,
    *,
    on_progress: OnProgress | None = None,
    on_answer: Callable[[bytes], None] | None = None,
    clock: Callable[[], float] = time.time,
) -> list[JobReport]:
    """Run several jobs as one plan. Every job has its own journal and files, which are those of the job alone but for
    the count of cached tokens. Returns: a report for each, in their order. Raises: as `run_job`.
    """
    doors = [_file_of(job) for job in jobs]
    check_jobs_apart([door.paths for door in doors])
    with ExitStack() as stack:
        attempts = [
            stack.enter_context(Attempt(job, codec, door, clock, on_answer))
            for job, door in zip(jobs, doors, strict=True)
        ]
        return _Joint(attempts, on_progress or _ignore).run(generate)


def _file_of(job: BatchJob) -> BatchFile:
    return BatchFile(job.input_path, job.output_path, job.errors_path, job.served, job.limits)


class _Joint:
    """Several attempts that share one run of the engine."""

    def __init__(
        self,
        attempts: Sequence[Attempt],
        on_progress: OnProgress,
        max_planned: int | None = MAX_PLANNED_REQUESTS,
    ) -> None:
        self._attempts = attempts
        self._on_progress = on_progress
        self._max_planned = max_planned
        self._progress = JobProgress(0, 0)

    def run(self, generate: Generate) -> list[JobReport]:
        heard = Heard()
        try:
            with terminable() as heard:
                for attempt in self._attempts:
                    attempt.begin()
                return self._run(generate)
        except KeyboardInterrupt:
            raise JobInterrupted(self._how_to_go_on(), heard.exit_code) from None

    def _run(self, generate: Generate) -> list[JobReport]:
        attempts = self._attempts
        self._progress.num_requests = sum(attempt.num_requests for attempt in attempts)
        self._progress.num_done = self._progress.num_earlier = sum(attempt.num_done for attempt in attempts)
        if any(attempt.report is None for attempt in attempts):
            self._on_progress(self._progress)
        try:
            self._generate(generate)
        finally:
            for attempt in attempts:
                attempt.sync()
        reports = [attempt.finish() for attempt in attempts]
        num_windows = self._progress.num_windows
        if num_windows == 1:
            return reports
        note = (
            f"The requests were planned in {num_windows} parts, one after the other; times and other figures of the "
            "engine are those of the last part."
        )
        return [replace(report, notes=(*report.notes, note)) for report in reports]

    def _generate(self, generate: Generate) -> None:
        waiting = [(attempt, pending) for attempt in self._attempts if (pending := attempt.pending()) is not None]
        if not waiting:
            return
        joined = join_pending([pending for _, pending in waiting])

        def apply(row: int, output: SequenceOutput) -> None:
            if output.finish_reason == "cancelled":
                return
            job, number = joined.place_of(row)
            attempt = waiting[job][0]
            attempt.apply(number, output)
            self._count(output)
            self._on_progress(self._progress)
            if len(waiting) > 1 and attempt.is_whole:
                attempt.finish()

        pending = joined.pending
        windows = windows_of(pending, self._max_planned or len(pending))
        self._progress.num_windows = len(windows)
        while windows:
            rows = windows.pop(0)
            part = pending if len(rows) == len(pending) else PendingRequests(pending.store, pending.numbers[rows])
            _run_window(generate(part), rows, apply)

    def _count(self, output: SequenceOutput) -> None:
        self._progress.num_done += 1
        self._progress.num_prompt_tokens += output.num_prompt_tokens
        self._progress.num_cached_tokens += output.num_cached_tokens
        self._progress.num_output_tokens += output.num_output_tokens

    def _how_to_go_on(self) -> str:
        progress = self._progress
        if not progress.num_requests:
            return "interrupted before any request ran; nothing is lost: run the same command again"
        where = f"in {self._attempts[0].paths.journal}" if len(self._attempts) == 1 else "beside the outputs"
        return (
            f"interrupted: {progress.num_done} of {progress.num_requests} requests are finished and kept {where}; run "
            "the same command again to go on"
        )


def _run_window(outputs: Iterator[SequenceOutput], rows: Int64s, apply: Callable[[int, SequenceOutput], None]) -> None:
    """Apply all outputs; after a Ctrl-C those that have ended by then. `rows` are what their indices stand for."""
    try:
        for output in outputs:
            apply(int(rows[output.index]), output)
    except KeyboardInterrupt as interrupt:
        for output in left_of(outputs, interrupt):
            apply(int(rows[output.index]), output)
        raise
    finally:
        if isinstance(outputs, Generator):
            outputs.close()  # the engine gives its memory back now, not at the next collection

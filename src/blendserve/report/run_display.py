"""Progress of a job on an engine: the job's count of answers beside what the engine does now."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from blendserve.engines.base import Engine, EngineStatus
from blendserve.job.job import JobProgress
from blendserve.report.progress import Progress, Snapshot


class RunDisplay:
    """Shows a run from its first request on; hand `note` to the job."""

    def __init__(self, engine: Engine, *, is_quiet: bool, noun: str = "requests") -> None:
        self._engine = engine
        self._latest: JobProgress | None = None
        self._progress = Progress(self._read, is_quiet=is_quiet, noun=noun)

    def note(self, progress: JobProgress) -> None:
        """Take the job's count of what is done."""
        self._latest = progress

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def _read(self) -> Snapshot | None:
        status = self._engine.status()
        return None if self._latest is None or status is None else snapshot_of(self._latest, status)


def snapshot_of(progress: JobProgress, status: EngineStatus) -> Snapshot:
    """Both together; where the engine does not know its tokens and hits, the job's count of them."""
    num_tokens, hit_rate = status.num_tokens, status.prefix_hit_rate
    num_expected = status.num_expected_tokens
    if num_tokens is None or progress.num_windows > 1:
        num_tokens = progress.num_prompt_tokens + progress.num_output_tokens
    if progress.num_windows > 1:  # the engine knows one of them; the others will be like what is done
        num_expected = num_tokens * progress.num_pending / max(1, progress.num_done_now)
    if hit_rate is None:
        hit_rate = progress.num_cached_tokens / max(1, progress.num_prompt_tokens)
    return Snapshot(
        num_done=progress.num_done,
        num_requests=progress.num_requests,
        num_tokens=num_tokens,
        num_expected_tokens=max(0.0, num_expected - num_tokens),
        num_running=status.num_running,
        kv_use=status.kv_use,
        prefix_hit_rate=hit_rate,
        unit=status.unit,
    )

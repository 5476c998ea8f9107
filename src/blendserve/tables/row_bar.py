"""The bar of a job on a table that was started from Python."""

from __future__ import annotations

from typing import Any, Self

from blendserve.job.job import JobProgress


class RowBar:
    """A bar of answered rows with tokens and the time that is left: in a notebook, a widget where there are any."""

    def __init__(self) -> None:
        self._bar: Any = None

    def note(self, progress: JobProgress) -> None:
        """Take the job's count of what is done."""
        from tqdm.auto import tqdm

        if self._bar is None:
            self._bar = tqdm(total=progress.num_requests, unit="row")
        self._bar.n = progress.num_done
        tokens = f"{progress.num_prompt_tokens} tokens in, {progress.num_output_tokens} out"
        self._bar.set_postfix_str(tokens, refresh=False)
        self._bar.update(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()

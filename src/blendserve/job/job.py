"""One batch job as values: what to answer, where it stands, how it ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blendserve.dialect.schema import ServedModel
from blendserve.job.journal import JobIdentity
from blendserve.job.reader import DEFAULT_LIMITS, ReadLimits
from blendserve.models.chat_settings import TodaysDate

EXIT_ANSWERED = 0
EXIT_ERROR_ROWS = 3
"""A job is finished, and some of its lines, or all of them, have error rows."""


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What to answer, where to, by which model.

    `model_identity` names the weights exactly (a path, a hash); `settings` holds every other setting that changes
    answers, JSON values only. Order, threads and memory are none: they change time, not tokens. `capacity` is the
    memory setting that error rows for want of memory depend on: another one tries those lines again. `retries_failed`:
    try lines again whose failure may pass. `reuses`: where the input has changed, keep the answers to lines that have
    not.
    """

    input_path: Path
    output_path: Path
    served: ServedModel
    model_identity: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    errors_path: Path | None = None
    is_ordered: bool = False
    is_fresh: bool = False
    retries_failed: bool = False
    reuses: bool = False
    limits: ReadLimits = DEFAULT_LIMITS
    capacity: int = 0

    def identity(self, input_sha256: str, recorded: JobIdentity | None = None) -> JobIdentity:
        """All that the answers depend on, for an input of this hash. A date that nobody has given is that of
        `recorded`, the job that is gone on with.
        """
        dates = {name: value for name, value in self.settings.items() if isinstance(value, TodaysDate)}
        kept = {name: recorded.settings[name] for name in dates if recorded is not None and name in recorded.settings}
        settings = {
            **self.settings,
            **kept,
            "model names": ", ".join(self.served.names),
            "max_model_len": self.served.max_model_len,
            "vocab_size": self.served.vocab_size,
            "max_line_bytes": self.limits.max_line_bytes,
            "max_line_requests": self.limits.max_line_requests,
        }
        return JobIdentity(input_sha256, self.model_identity, json.loads(json.dumps(settings)))


@dataclass(slots=True)
class JobProgress:
    """Where a job stands.

    `num_requests` and `num_done` count answers to valid lines (a line with `n` of 3 counts 3), those of earlier runs
    included; `num_earlier` are those alone. Tokens are those of this run. `num_windows`: the requests are planned in so
    many parts, one after the other.
    """

    num_requests: int
    num_done: int
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_windows: int = 1
    num_earlier: int = 0

    @property
    def num_pending(self) -> int:
        """Requests that this run has to answer."""
        return self.num_requests - self.num_earlier

    @property
    def num_done_now(self) -> int:
        """Requests that this run has answered."""
        return self.num_done - self.num_earlier


@dataclass(frozen=True, slots=True)
class JobReport:
    """How a job ended.

    - `output_path`, `errors_path`: the files; `errors_path` is None when every line was answered.
    - `num_lines`, `num_succeeded`, `num_failed`: lines of the input, rows of the output, rows of the error file.
    - `exit_code`: 0 when every line was answered, 3 when the error file has rows. Both are finished jobs; a job that
      could not run raises an error instead.
    - `errors_by_code`: how many error rows have each code.
    - `served_model`, `requested_model`: the model that answered, and the one that the lines asked for, if any.
    - `num_resumed`: requests that earlier runs had answered.
    - `num_reused`: lines that kept their answers when the input changed (tables only).
    - `retriable_by_code`: how many error rows of each code may be answered on another try (failures of the engine or
      the server, timeouts, too little memory): `retry_failed` tries them again.
    - `num_prompt_tokens`, `num_cached_tokens`, `num_output_tokens`: tokens of this run; cached ones are prompt tokens
      that were not computed again.
    - `was_complete`: an earlier run had finished the job, and this one did nothing.
    - `notes`: sentences that the user should read.
    """

    output_path: str
    errors_path: str | None
    num_lines: int
    num_succeeded: int
    errors_by_code: Mapping[str, int]
    served_model: str
    requested_model: str | None
    num_resumed: int = 0
    num_reused: int = 0
    retriable_by_code: Mapping[str, int] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    was_complete: bool = False
    notes: tuple[str, ...] = ()

    @property
    def num_failed(self) -> int:
        return sum(self.errors_by_code.values())

    @property
    def exit_code(self) -> int:
        """What `blendserve run` returns for this job: `EXIT_ANSWERED` (0) when every line was answered, else
        `EXIT_ERROR_ROWS` (3), also when no line was."""
        return EXIT_ERROR_ROWS if self.num_failed else EXIT_ANSWERED

"""What the service and its engine process say to each other: frozen values that pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blendserve.job.reader import ReadLimits
from blendserve.serve.settings import ModelChoice


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """A batch as the engine process needs it. `directory` is its journal; every row carries `created_at`."""

    id: str
    input_path: Path
    input_sha256: str
    directory: Path
    endpoint: str
    created_at: int
    limits: ReadLimits


# To the engine process


@dataclass(frozen=True, slots=True)
class Open:
    """The first message: which model to answer with, and the file whose lock one engine process at a time holds."""

    model: ModelChoice
    lock_path: Path


@dataclass(frozen=True, slots=True)
class Share:
    """What a round takes of a batch: at most `max_requests` of those that are left; None stands for all."""

    batch: BatchSpec
    max_requests: int | None = None


@dataclass(frozen=True, slots=True)
class RunRound:
    """Answer these together, by one plan."""

    number: int
    shares: tuple[Share, ...]
    policy: str


@dataclass(frozen=True, slots=True)
class Release:
    """Let go of a batch's journal, whatever still runs. Answered by `Released`."""

    batch_id: str


@dataclass(frozen=True, slots=True)
class Yield:
    """Admit nothing more in this round; it ends when what runs has ended."""

    number: int


@dataclass(frozen=True, slots=True)
class Draw:
    """Draw the plan of this round, if it still runs. Answered by `Picture`."""

    number: int


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to answer ahead of all batches. Its answer carries `created`."""

    id: str
    created: int
    url: str
    body: Mapping[str, Any]
    is_streamed: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """Nobody waits for this answer any more."""

    id: str


Command = Open | RunRound | Release | Yield | Draw | Ask | Forget

# From the engine process


@dataclass(frozen=True, slots=True)
class Opened:
    """The model is there, under this identity."""

    model: str
    identity: str
    can_ask: bool


@dataclass(frozen=True, slots=True)
class OpeningFailed:
    """The model cannot be opened."""

    model: str
    message: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a batch stands. Requests are choices; rows are lines. Tokens are those of this round."""

    batch_id: str
    num_requests: int
    num_done: int
    num_completed: int
    num_failed: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class BatchDone:
    """Every line has its row, and the journal is free."""

    batch_id: str


@dataclass(frozen=True, slots=True)
class BatchBroken:
    """The batch as a whole cannot be answered, and the journal is free."""

    batch_id: str
    message: str


@dataclass(frozen=True, slots=True)
class Released:
    """The journal is free."""

    batch_id: str


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """All journals of the round are free. `error` says why it ended early, if it did; `is_for_space`: the disk is full,
    which is no fault of the engine or of a batch. `run_s`: the time in which requests ran.
    """

    number: int
    num_rows: int
    error: str | None = None
    is_for_space: bool = False
    run_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineState:
    """What the engine does now."""

    num_running: int
    kv_use: float | None
    prefix_hit_rate: float | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Picture:
    """The plan of a round: two drawings in SVG. Prompts can be read in the second one."""

    number: int
    num_requests: int
    num_prompt_tokens: int
    num_unique_tokens: int
    density: str
    icicle: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a streamed answer: the new text of one choice."""

    id: str
    choice: int
    text: str
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of an `Ask`."""

    id: str
    status_code: int
    body: Mapping[str, Any]


Report = (
    Opened
    | OpeningFailed
    | Progress
    | BatchDone
    | BatchBroken
    | Released
    | RoundEnded
    | EngineState
    | Picture
    | Piece
    | Reply
)

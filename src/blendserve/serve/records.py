"""What the service remembers: files, uploads, batches and webhook deliveries as frozen values that are stored as JSON.

`owner` is the id of the API key that made a record; it is empty where the service runs without keys. Times are Unix
seconds.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blendserve.serve.states import Ending, Status, is_ended, may_follow

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
INPUT_PURPOSE, OUTPUT_PURPOSE = "batch", "batch_output"


def new_id(prefix: str) -> str:
    """A name that nobody can guess."""
    return f"{prefix}_{secrets.token_hex(16)}"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file. `batch_id` is the batch that wrote it, if one did. Units: `num_bytes`."""

    id: str
    owner: str
    created_at: int
    filename: str
    purpose: str
    num_bytes: int
    num_lines: int = 0
    sha256: str = ""
    expires_at: int | None = None
    batch_id: str | None = None

    @property
    def label(self) -> str:
        return self.purpose

    def to_json(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, slots=True)
class UploadPart:
    """One part of an upload, already on the disk."""

    id: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """A file that arrives in parts. `status` is pending, completed, cancelled or expired."""

    id: str
    owner: str
    created_at: int
    filename: str
    purpose: str
    mime_type: str
    num_bytes: int
    expires_at: int
    status: str = "pending"
    parts: tuple[UploadPart, ...] = ()
    file_id: str | None = None
    file_lifetime_s: int | None = None

    @property
    def label(self) -> str:
        return self.status

    def to_json(self, file: FileRecord | None = None) -> dict[str, Any]:
        """OpenAI's upload object."""
        return {
            "id": self.id,
            "object": "upload",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": self.status,
            "expires_at": self.expires_at,
            "file": None if file is None else file.to_json(),
        }


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch. `output_id` and `errors_id` are the names that its files will have; `output_file_id` and
    `error_file_id` are set once those files stand. `ending` is what the batch becomes after `finalizing`.
    """

    id: str
    owner: str
    created_at: int
    input_file_id: str
    endpoint: str
    completion_window: str
    expires_at: int
    output_id: str
    errors_id: str
    model: str | None = None
    status: Status = "validating"
    ending: Ending | None = None
    metadata: Mapping[str, str] | None = None
    files_lifetime_s: int | None = None
    errors: tuple[Mapping[str, Any], ...] = ()
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    usage: Mapping[str, Any] | None = None
    times: Mapping[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.status

    def moved(self, status: Status, now: int, **changes: Any) -> BatchRecord:
        """The batch in another state, reached now."""
        assert may_follow(self.status, status), f"{self.status} batch cannot become {status}"
        times = {**self.times, f"{status}_at": now}
        return replace(self, status=status, times=times, **changes)

    @property
    def is_ended(self) -> bool:
        return is_ended(self.status)

    def counted(self, counts: tuple[int, int] | None) -> BatchRecord:
        """The batch with rows of answers and of errors, where those are known."""
        return self if counts is None else replace(self, num_completed=counts[0], num_failed=counts[1])

    def to_json(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        errors = [{"code": None, "line": None, "message": None, "param": None, **error} for error in self.errors]
        names = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{f"{name}_at": self.times.get(f"{name}_at") for name in names},
            "request_counts": {
                "total": self.num_lines,
                "completed": self.num_completed,
                "failed": self.num_failed,
            },
            "metadata": None if self.metadata is None else dict(self.metadata),
            "usage": self.usage,
        }


@dataclass(frozen=True, slots=True)
class ReplyRecord:
    """What a request with an Idempotency-Key was answered; `request_hash` is of what it asked for."""

    id: str
    owner: str
    created_at: int
    expires_at: int
    request_hash: str
    object_id: str

    @property
    def label(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A webhook that is to be delivered. `next_at` is when it is tried next."""

    id: str
    owner: str
    created_at: int
    expires_at: int
    url: str
    body: str
    num_tries: int = 0
    next_at: float = 0.0

    @property
    def label(self) -> str:
        return ""


Record = FileRecord | UploadRecord | BatchRecord | ReplyRecord | DeliveryRecord

_WINDOW = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}
MAX_WINDOW_S = 366 * 86400


def window_seconds(text: str) -> int | None:
    """Seconds of a completion window such as 30m, 24h or 7d; None where it is no such thing."""
    found = _WINDOW.fullmatch(text)
    if found is None:
        return None
    seconds = int(found[1]) * _SECONDS[found[2]]
    return seconds if seconds <= MAX_WINDOW_S else None

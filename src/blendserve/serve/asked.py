"""What a body asks for that makes a batch: every field checked, in OpenAI's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from blendserve.serve.failures import invalid
from blendserve.serve.library import read_lifetime
from blendserve.serve.records import ENDPOINTS, window_seconds

_MAX_PAIRS, _MAX_NAME, _MAX_VALUE = 16, 64, 512


class AskedBatch(NamedTuple):
    """The fields of a good body. `files_lifetime_s` is None where the service decides."""

    input_file_id: str
    endpoint: str
    completion_window: str
    window_s: int
    metadata: dict[str, str] | None
    files_lifetime_s: int | None


def read_asked(body: Mapping[str, Any]) -> AskedBatch:
    """Raises: ApiError."""
    endpoint, window = body.get("endpoint"), body.get("completion_window")
    for name, value in (("endpoint", endpoint), ("completion_window", window)):
        if value is None:
            raise invalid(f"'{name}' is required.", name, "missing_required_parameter")
    if endpoint not in ENDPOINTS:
        raise invalid(f"endpoint is {str(endpoint)[:80]!r}; it must be one of {', '.join(ENDPOINTS)}.", "endpoint")
    window_s = window_seconds(window) if isinstance(window, str) else None
    if window_s is None:
        raise invalid(
            f"completion_window is {str(window)[:40]!r}; write minutes, hours or days, such as 30m, 24h or 7d.",
            "completion_window",
        )
    input_id, lifetime = body.get("input_file_id"), body.get("output_expires_after")
    if not isinstance(input_id, str):
        raise invalid("'input_file_id' is required.", "input_file_id", "missing_required_parameter")
    return AskedBatch(
        input_file_id=input_id,
        endpoint=str(endpoint),
        completion_window=str(window),
        window_s=window_s,
        metadata=_read_metadata(body.get("metadata")),
        files_lifetime_s=None if lifetime is None else read_lifetime(lifetime, "output_expires_after"),
    )


def _read_metadata(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise invalid("metadata must be an object of texts.", "metadata")
    if len(value) > _MAX_PAIRS:
        raise invalid(f"metadata has {len(value)} entries; at most {_MAX_PAIRS} are taken.", "metadata")
    for name, text in value.items():
        if not isinstance(text, str) or len(name) > _MAX_NAME or len(text) > _MAX_VALUE:
            raise invalid(
                f"metadata takes names of at most {_MAX_NAME} characters and texts of at most {_MAX_VALUE}; "
                f"{name[:_MAX_NAME]!r} is none.",
                "metadata",
            )
    return value

"""Which failures may pass, so that it is worth trying their lines again."""

from __future__ import annotations

from blendserve.errors import CapacityError, RequestError
from blendserve.job.record_log import RecordKind
from blendserve.request import ServerResponse

PASSING_CODES = frozenset(
    ("connection_error", "request_timeout", "invalid_server_response", "engine_error", "engine_failure", "server_error")
)
"""Codes of our own that say that an engine failed, not that the line is wrong."""
_PASSING_STATUSES = frozenset((401, 402, 403, 408, 409, 425, 429))
"""What a server says of keys, quotas, time and load; and everything from 500 up."""


def may_pass(status_code: int, code: str | None) -> bool:
    """May the same line be answered another time?"""
    return status_code in _PASSING_STATUSES or status_code >= 500 or code in PASSING_CODES


def kind_of_response(response: ServerResponse) -> RecordKind:
    """How a server's answer is recorded."""
    if response.is_success:
        return RecordKind.OUTPUT_ROW
    return RecordKind.PASSING_ROW if may_pass(response.status_code, None) else RecordKind.ERROR_ROW


def kind_of_error(error: Exception) -> RecordKind:
    """How the failure of a request is recorded."""
    if isinstance(error, CapacityError):
        return RecordKind.CAPACITY_ROW
    if isinstance(error, RequestError) and not may_pass(error.status_code, error.code):
        return RecordKind.ERROR_ROW
    return RecordKind.PASSING_ROW

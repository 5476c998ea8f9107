"""Every error that BlendServe raises on purpose.

A message says what happened, the actual value, the limit, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial


class BlendServeError(Exception):
    """Root of all errors raised on purpose; the command line prints it without a traceback."""


class ConfigError(BlendServeError):
    """A setting, a path or a model that cannot work; raised before any request runs."""


class RequestError(BlendServeError):
    """One request that cannot be served: it becomes a row of the error file and never ends the run.

    `code` is machine-readable (`invalid_json_line`, `context_length_exceeded`, ...), `param` names the
    offending field of the request body, `status_code` is the HTTP status that OpenAI would answer, 0 where the
    line of a batch file never became a request (no JSON, a duplicate custom_id, an unknown url).
    """

    def __init__(self, message: str, *, code: str, param: str | None = None, status_code: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.status_code = status_code

    def __reduce__(self) -> tuple[Callable[..., RequestError], tuple[str]]:
        """Pickle with the keywords, which the default leaves out."""
        return partial(RequestError, code=self.code, param=self.param, status_code=self.status_code), (self.message,)


class CapacityError(BlendServeError):
    """Memory or disk that cannot hold what was asked for."""


class ExecutorError(BlendServeError):
    """An executor could not run a step; the run ends, finished work is kept."""

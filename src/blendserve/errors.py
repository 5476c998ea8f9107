"""Every error that BlendServe raises on purpose.

    BlendServeError       the root: the command line prints its message, and exits with 1
    |-- ConfigError       a setting, a path, a model or a journal does not work; raised before any request runs
    |-- RequestError      one request cannot be served; it becomes a row of the error file, and the run goes on
    |-- CapacityError     memory or disk is too small: for one request (an error row), or for the run, which then ends
    `-- ExecutorError     the engine failed; the run ends, and what is finished is kept

    KeyboardInterrupt     Ctrl-C, as Python knows it
    `-- JobInterrupted    Ctrl-C or SIGTERM ended a job; what is finished is kept (`blendserve.job.interrupts`)

A message says what happened, the actual value, the limit, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial


class BlendServeError(Exception):
    """The root of all errors raised on purpose. Catch it to catch them all."""


class ConfigError(BlendServeError):
    """A setting, a path, a model or a journal does not work. Raised before any request runs."""


class RequestError(BlendServeError):
    """One request cannot be served. It becomes a row of the error file and never ends the run.

    `code` is for programs (`invalid_json_line`, `context_length_exceeded`, ...). `param` names the field that is wrong.
    `status_code` is the HTTP status that OpenAI would answer; it is 0 for a line that never became a request (it is not
    JSON, repeats a custom_id or has an unknown url). docs/batch-files.md lists all codes.
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
    """Memory or disk is too small for what was asked."""


class ExecutorError(BlendServeError):
    """The engine failed. The run ends; finished answers are kept, and the same command goes on."""

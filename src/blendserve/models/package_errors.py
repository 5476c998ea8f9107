"""Errors of the `tokenizers` package, which raises nothing narrower than Exception, and panics with what is no
Exception: `except Exception` lets a damaged file end the program in a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from blendserve.errors import BlendServeError, ConfigError

MEANT = (BlendServeError, KeyboardInterrupt, SystemExit, GeneratorExit)
"""What is no failure of the package."""
_MAX_SHOWN = 120


@contextmanager
def told_as(what: str, remedy: str = "download the model again") -> Iterator[None]:
    """Any failure inside becomes a ConfigError: "{what}: {reason}; {remedy}"."""
    try:
        yield
    except MEANT:
        raise
    except BaseException as error:
        raise ConfigError(f"{what}: {reason_of(error)}; {remedy}") from error


def reason_of(error: BaseException) -> str:
    """What the package says, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:_MAX_SHOWN]

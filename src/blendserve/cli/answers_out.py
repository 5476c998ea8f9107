"""Answers on standard output, one row in a line, while everything else goes to standard error."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from blendserve.errors import BlendServeError


def print_answer(row: bytes) -> None:
    """Print a row now. Raises: BlendServeError where nobody reads any more."""
    try:
        sys.stdout.buffer.write(row)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise _reader_is_gone() from None


def print_answers_of(path: Path) -> None:
    """Print a whole file of rows. Raises: as `print_answer`."""
    try:
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise _reader_is_gone() from None


def _reader_is_gone() -> BlendServeError:
    """Mutates: standard output, so that what waits in it is not tried again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BlendServeError(
        "whoever read the answers from standard output has closed it; finished answers are kept: run the same command "
        "again to go on"
    )

"""Durable files: what must survive a crash is written through here, and a full disk is told apart from other faults.

Files are opened without following links: somebody else may have put one there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blendserve.errors import BlendServeError, CapacityError

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn what the system refuses into our errors.

    Raises: CapacityError when the disk (or a quota, or a file size limit) is full; BlendServeError for the rest.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CapacityError(
                f"no space left to write {path}: finished requests are kept; free some space, then run the same "
                "command again to go on"
            ) from error
        remedy = ""
        if error.errno == errno.EROFS:
            remedy = "; finished requests are kept: mount it for writing, then run the same command again to go on"
        raise BlendServeError(f"cannot write {path}: {error.strerror or error}{remedy}") from error


def write_fully(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`. Raises: OSError; then part of the data may stand there."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def open_own(path: Path, flags: int = 0, *, directory: int | None = None) -> int:
    """Open a file of ours, made for our eyes alone where it is missing (with O_CREAT). Raises: OSError for a link."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)


def create_new(path: Path, mode: int = 0o600) -> int:
    """Open a new file for writing; what stood under its name is removed, not written to. `mode` is under the umask."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def replace_durably(path: Path, data: bytes) -> None:
    """Give `path` new content that survives a power cut as a whole or not at all."""
    replace_durably_by_pieces(path, (data,))


def replace_durably_by_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """The same of content that is made piece by piece."""
    temporary = path.with_name(path.name + ".partial")
    with writing_to(path):
        with open(create_new(temporary), "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make names created, renamed or removed in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The bytes of files. `Blobs` is the seam; `DirectoryBlobs` keeps one file per blob in a directory.

A blob appears whole or not at all: it is written under another name, synced, and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from blendserve.errors import CapacityError, ConfigError
from blendserve.job.disk import create_new, sync_directory

_NAME = re.compile(r"[a-z]+[_-][0-9a-f]{32}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BlobWriter(Protocol):
    """A blob that is being written. `commit` makes it appear; `abort` leaves nothing."""

    @property
    def num_bytes(self) -> int: ...
    @property
    def num_lines(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    def write(self, data: bytes) -> None: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...


class Blobs(Protocol):
    """Blobs by name. `path` is where a reader in this machine finds one."""

    def create(self, name: str) -> BlobWriter: ...
    def path(self, name: str) -> Path: ...
    def open(self, name: str) -> BinaryIO: ...
    def delete(self, name: str) -> None: ...
    def sweep(self, known: Collection[str]) -> int: ...
    def free_bytes(self) -> int: ...


class DirectoryBlobs:
    """`Blobs` in the directories `files` and `partial` of a place. Raises: ConfigError when it cannot be written."""

    def __init__(self, root: Path) -> None:
        self._files = root / "files"
        self._partial = root / "partial"
        try:
            for directory in (self._files, self._partial):
                directory.mkdir(mode=0o700, exist_ok=True)
            for entry in self._partial.iterdir():  # what a killed service was writing
                entry.unlink()
            probe = self._partial / "probe"
            os.close(create_new(probe))
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"cannot write in {root}: {error.strerror}; give --data a directory that you may write to"
            ) from error

    def create(self, name: str) -> BlobWriter:
        """Begin a blob. Raises: CapacityError when the disk is full."""
        return _FileWriter(self.path(name), self._partial / f"{name}.{secrets.token_hex(4)}")

    def path(self, name: str) -> Path:
        assert _NAME.fullmatch(name), f"{name!r} is no name of a blob"
        return self._files / name

    def open(self, name: str) -> BinaryIO:
        """Raises: FileNotFoundError."""
        return self.path(name).open("rb")

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def sweep(self, known: Collection[str]) -> int:
        """Delete what nobody knows. Returns: how many blobs that were."""
        unknown = [entry for entry in self._files.iterdir() if entry.name not in known]
        for entry in unknown:
            entry.unlink(missing_ok=True)
        return len(unknown)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._files).free


class _FileWriter:
    """Writes and hashes. Raises: CapacityError when the disk is full; nothing is left then."""

    def __init__(self, target: Path, partial: Path) -> None:
        self.num_bytes = 0
        self.num_lines = 0
        self._target = target
        self._partial = partial
        self._hash = hashlib.sha256()
        self._ends_in_line = True
        try:
            self._file = os.fdopen(create_new(partial), "wb")
        except OSError as error:
            raise _as_ours(error) from error

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        if not data:
            return
        try:
            self._file.write(data)
        except OSError as error:
            self.abort()
            raise _as_ours(error) from error
        self._hash.update(data)
        self.num_bytes += len(data)
        self.num_lines += data.count(b"\n")
        self._ends_in_line = data.endswith(b"\n")

    def commit(self) -> None:
        """Make the blob appear and survive a power cut. A last line without an end counts as a line."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._target)
            sync_directory(self._target.parent)
        except OSError as error:
            self.abort()
            raise _as_ours(error) from error
        self.num_lines += not self._ends_in_line

    def abort(self) -> None:
        with suppress(OSError):  # a full disk refuses what was still buffered
            self._file.close()
        self._partial.unlink(missing_ok=True)


def _as_ours(error: OSError) -> CapacityError | OSError:
    if error.errno in _FULL:
        return CapacityError("the disk of the service is full; delete files or free some space, then try again")
    return error

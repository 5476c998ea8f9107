"""The files of a store, opened for reading."""

from __future__ import annotations

import hashlib
import mmap
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.errors import ConfigError
from blendserve.job.disk import open_own
from blendserve.job.store_layout import FILES, StoredFile


class StoreFiles:
    """What `StoreWriter` left in a directory. `arrays` are memory maps, for those who read many lines at a time: call
    `release` behind that. `read` leaves nothing in memory.

    Raises: ConfigError when a file is not what `files` says.
    """

    def __init__(self, directory: Path, files: Mapping[str, StoredFile]) -> None:
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)
        self._maps: list[mmap.mmap] = []
        self.arrays: dict[str, NDArray[Any]] = {}
        for name, dtype in FILES.items():
            self._open(directory / name, files.get(name))
            content: Any = b""
            if os.fstat(self._descriptors[name]).st_size:
                content = mmap.mmap(self._descriptors[name], 0, access=mmap.ACCESS_READ)
                self._maps.append(content)
            self.arrays[name] = np.frombuffer(content, dtype)

    def read(self, name: str, begin: int, num_bytes: int) -> bytes:
        """Some bytes of a file."""
        return os.pread(self._descriptors[name], num_bytes, begin)

    def release(self) -> None:
        """Let go of the pages of all maps; they come back when they are read again."""
        for content in self._maps:
            content.madvise(mmap.MADV_DONTNEED)

    def _open(self, path: Path, expected: StoredFile | None) -> None:
        if expected is None or not path.is_file() or path.stat().st_size != expected.num_bytes:
            raise _damaged(path)
        self._descriptors[path.name] = open_own(path)
        with path.open("rb", buffering=0) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                raise _damaged(path)


def _close_all(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _damaged(path: Path) -> ConfigError:
    return ConfigError(f"{path} is damaged; discard the journal with --fresh")

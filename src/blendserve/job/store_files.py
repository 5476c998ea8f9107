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
    """What `StoreWriter` left in a directory, as bytes for one line, and as arrays for those who read many at a time.

    Raises: ConfigError when a file is not what `files` says.
    """

    def __init__(self, directory: Path, files: Mapping[str, StoredFile]) -> None:
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)
        self._maps: dict[str, NDArray[Any]] | None = None
        for name in FILES:
            self._open(directory / name, files.get(name))

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Memory maps of all files, until `release` is called."""
        if self._maps is None:
            self._maps = {name: _mapped(self._descriptors[name], dtype) for name, dtype in FILES.items()}
        return self._maps

    def read(self, name: str, begin: int, num_bytes: int) -> bytes:
        """Some bytes of a file, without a map."""
        return os.pread(self._descriptors[name], num_bytes, begin)

    def release(self) -> None:
        """Let go of the maps: their pages count as memory of this process. An array that is still in use stays."""
        self._maps = None

    def _open(self, path: Path, expected: StoredFile | None) -> None:
        if expected is None or not path.is_file() or path.is_symlink() or path.stat().st_size != expected.num_bytes:
            raise _damaged(path)
        descriptor = self._descriptors[path.name] = open_own(path)
        with open(descriptor, "rb", buffering=0, closefd=False) as file:  # what is checked is what will be read
            if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                raise _damaged(path)


def _mapped(descriptor: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    has_content = os.fstat(descriptor).st_size > 0
    return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if has_content else b"", dtype)


def _close_all(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _damaged(path: Path) -> ConfigError:
    return ConfigError(f"{path} is damaged; discard the journal with --fresh")

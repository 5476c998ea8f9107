"""Where files are: paths and URLs of fsspec, what they stand for, and which version of a file is there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import fsspec
from fsspec.core import url_to_fs

from blendserve.errors import BlendServeError, ConfigError

_GLOB_SIGNS = "*?["
_WEB_FIELDS = ("size", "ETag", "Last-Modified", "Content-MD5", "Digest")


@contextmanager
def using(url: str, verb: str) -> Iterator[None]:
    """Turn what a file system raises into our error. Every fsspec backend has exceptions of its own."""
    try:
        yield
    except (BlendServeError, KeyboardInterrupt):
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"cannot {verb} {url}: there is no such file") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConfigError(f"cannot {verb} {url}: {reason}") from error


@dataclass(frozen=True, slots=True)
class Place:
    """One file. `path` is what its file system calls it, `url` what the user wrote or would write."""

    url: str
    path: str
    fs: Any

    @property
    def is_local(self) -> bool:
        return _is_local(self.fs)

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def open(self) -> IO[bytes]:
        """Open for reading, from any position. Raises: ConfigError."""
        with using(self.url, "read"):
            return cast(IO[bytes], Path(self.path).open("rb") if self.is_local else self.fs.open(self.path, "rb"))

    def version(self) -> str:
        """Changes when the file changes, for as much as its file system tells without reading it."""
        with using(self.url, "read"):
            if not self.is_local:
                self.fs.invalidate_cache()
                return f"{self.fs.ukey(self.path)}{self._web_version()}"
            found = Path(self.path).stat()
            return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"

    def _web_version(self) -> str:
        """What a web server says of a file; fsspec's own key of it is the URL alone. Empty for other file systems."""
        protocols = [self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol
        if not {"http", "https"} & {*protocols}:
            return ""
        info = self.fs.info(self.path)
        return "".join(f" {name} {info[name]}" for name in _WEB_FIELDS if info.get(name) is not None)

    def digest(self) -> str:
        """The hash of a local file's bytes; of a remote one, its version: reading it again may cost money."""
        if not self.is_local:
            return self.version()
        with self.open() as file:
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def place_of(url: str) -> Place:
    """One file by its path or URL, whether it exists or not. Raises: ConfigError for an unknown protocol."""
    with using(url, "use"):
        fs, path = url_to_fs(url)
    return Place(url, path, fs)


def find_files(urls: Sequence[str], suffixes: Sequence[str]) -> list[Place]:
    """The files that paths, globs and directories stand for: in the order given, by name within each of them.

    Of a directory, files with one of `suffixes`, at any depth; hidden ones and those with `_` in front are left out.
    Raises: ConfigError when one stands for nothing.
    """
    return [place for url in urls for place in _found(url, suffixes)]


def _found(url: str, suffixes: Sequence[str]) -> list[Place]:
    place = place_of(url)
    with using(url, "read"):
        if any(sign in place.path for sign in _GLOB_SIGNS):
            paths = [path for path in sorted(place.fs.glob(place.path)) if not place.fs.isdir(path)]
            what = "no file has such a name"
        elif place.fs.isdir(place.path):
            below = sorted(place.fs.find(place.path))
            paths = [path for path in below if _is_part(path[len(place.path) :], suffixes)]
            what = f"the directory holds no file that ends in {', '.join(suffixes)}"
        else:
            place.fs.info(place.path)
            return [place]
    if not paths:
        raise ConfigError(f"{url}: {what}")
    urls = paths if place.is_local else [str(place.fs.unstrip_protocol(path)) for path in paths]
    return [Place(url, path, place.fs) for url, path in zip(urls, paths, strict=True)]


def _is_part(path: str, suffixes: Sequence[str]) -> bool:
    parts = PurePosixPath(path.lstrip("/")).parts
    return path.endswith(tuple(suffixes)) and not any(part.startswith((".", "_")) for part in parts)


def _is_local(fs: Any) -> bool:
    return isinstance(fs, fsspec.implementations.local.LocalFileSystem)

"""The bytes of a batch file: opened, hashed as stored, and unpacked where the file is compressed.

Compression is recognised by the first bytes. Files of other kinds (Parquet, UTF-16, ...) are refused as a whole.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from blendserve.errors import ConfigError
from blendserve.job.file_kinds import HEAD_BYTES, check_kind

if TYPE_CHECKING:
    from typing_extensions import Buffer

BUFFER_BYTES = 1 << 20
ZSTD_CHUNK_BYTES = 1 << 10
"""At most 32 MiB come out of so many bytes: a zstd block takes four and holds 128 KiB."""
COMPRESSED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")


class DamagedError(Exception):
    """A compressed file cannot be unpacked from here on."""


class _Unpacked(Protocol):
    def read1(self, size: int, /) -> bytes: ...


class _Compression(NamedTuple):
    """How a file is packed: its name, its first bytes, and what unpacks it."""

    name: str
    magic: bytes
    unpack: Callable[[io.BufferedReader[Any]], _Unpacked]


class HashingFile(io.RawIOBase):
    """A file as it is read, with the hash of all that went through."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        num_bytes = cast(int, self._file.readinto(view))
        self.sha256.update(view[:num_bytes])
        return num_bytes


class _UnpackedFile(io.RawIOBase):
    """A compressed stream in small reads: a read that spans damage would lose the good bytes before it."""

    def __init__(self, stream: _Unpacked, name: str) -> None:
        self._stream = stream
        self._name = name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        try:
            data = self._stream.read1(len(view))
        except (EOFError, zlib.error, lzma.LZMAError, DamagedError) as error:
            raise DamagedError(f"the {self._name} file is damaged from this line on ({error})") from None
        except OSError as error:
            if error.errno is not None:  # of the disk, not of what it holds
                raise
            raise DamagedError(f"the {self._name} file is damaged from this line on ({error})") from None
        view[: len(data)] = data
        return len(data)


class _ZstdStream:
    """Unpacks the frames of a zstd file one after the other."""

    def __init__(self, stored: io.BufferedReader[Any], new_frame: Callable[[], Any], error: type[Exception]) -> None:
        self._stored = stored
        self._new_frame = new_frame
        self._error = error
        self._frame: Any = None
        self._ready = b""
        self._waiting = b""

    def read1(self, size: int, /) -> bytes:
        while not self._ready:
            data = self._waiting or self._stored.read1(ZSTD_CHUNK_BYTES)
            self._waiting = b""
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise DamagedError("it ends in the middle")
                return b""
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise DamagedError(str(error)) from None
            if self._frame.eof:
                self._waiting = self._frame.unused_data
        data, self._ready = self._ready[:size], self._ready[size:]
        return data


def _open_zstd(stored: io.BufferedReader[Any]) -> _Unpacked:
    """Raises: ModuleNotFoundError where nothing here reads zstd."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return _ZstdStream(stored, zstd.ZstdDecompressor, zstd.ZstdError)
    import zstandard

    return _ZstdStream(stored, lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError)


_COMPRESSIONS = (
    _Compression("gzip", b"\x1f\x8b", lambda stored: gzip.GzipFile(fileobj=stored, mode="rb")),
    _Compression("bzip2", b"BZh", bz2.BZ2File),
    _Compression("xz", b"\xfd7zXZ\x00", lzma.LZMAFile),
    _Compression("zstd", b"\x28\xb5\x2f\xfd", _open_zstd),
)


def unpacked(stored: io.BufferedReader[Any], path: Path) -> io.BufferedReader[Any]:
    """The text of a file. Raises: ConfigError when it is of a kind that holds no text of JSON lines."""
    check_kind(_head(stored), path)
    for compression in _COMPRESSIONS:
        if _head(stored).startswith(compression.magic):
            stream = _UnpackedFile(_unpack(compression, stored, path), compression.name)
            content = io.BufferedReader(stream, BUFFER_BYTES)
            with suppress(DamagedError):  # the reader meets it again, and says in which line
                check_kind(_head(content), path)
                _check_packed_once(_head(content), path)
            return content
    return stored


def _unpack(compression: _Compression, stored: io.BufferedReader[Any], path: Path) -> _Unpacked:
    try:
        return compression.unpack(stored)
    except ModuleNotFoundError:
        raise ConfigError(
            f"{path} is compressed with zstd, which this Python cannot read yet: pip install zstandard; or unpack it "
            f"first: zstd -d {path}"
        ) from None


def _check_packed_once(head: bytes, path: Path) -> None:
    if any(head.startswith(compression.magic) for compression in _COMPRESSIONS):
        raise ConfigError(f"{path} is compressed twice; unpack it once first")


def _head(file: io.BufferedReader[Any]) -> bytes:
    return file.peek(HEAD_BYTES)[:HEAD_BYTES]


def check_readable(path: Path) -> None:
    """Raises: ConfigError when a file is missing, is no regular file, or cannot be opened."""
    with open_input(path):
        pass


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes as stored. Raises: ConfigError when it cannot be read."""
    with open_input(path) as file:
        return hashlib.file_digest(cast(io.BytesIO, file), "sha256").hexdigest()


@contextmanager
def open_input(path: Path) -> Iterator[io.RawIOBase]:
    """Open a file that can be read again after a crash. Raises: ConfigError."""
    if str(path) == "-":
        raise ConfigError("standard input cannot be read again after a crash; save it to a file and give its path")
    try:
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "not a regular file, so it cannot be read again after a crash"
            raise ConfigError(f"{path} is {kind}; give the path of a batch file (JSON lines)")
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error

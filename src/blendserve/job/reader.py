"""A batch file, read as a stream: every line that is not blank becomes a `BatchLine` or a `BadLine`, in order.

Memory is bounded by `max_line_bytes`, beside 15 bytes of hash (about 100 in Python) per custom_id. Gzip is recognised
by its first bytes. JSON stricter than Python's: no NaN, no duplicate keys, no lone surrogates.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from blendserve.dialect.parameters import shown
from blendserve.dialect.passthrough import parse_remote_line
from blendserve.dialect.schema import BatchLine, ServedModel, custom_id_of, parse_line
from blendserve.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from typing_extensions import Buffer

DEFAULT_MAX_LINE_BYTES = 32 << 20
_BUFFER_BYTES = 1 << 20
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be served; `custom_id` is what could be read of it."""

    line_number: int
    custom_id: str | None
    error: RequestError


class BatchReader:
    """One pass over a batch file.

    After the pass `sha256` is the hash of the file's bytes as stored, `num_lines` counts the lines that are not blank,
    and `requested_model` is the model name that the file agreed on (that of its first valid line).
    """

    def __init__(self, path: Path, served: ServedModel, max_line_bytes: int = DEFAULT_MAX_LINE_BYTES) -> None:
        self.sha256 = ""
        self.num_lines = 0
        self.requested_model: str | None = None
        self._path = path
        self._served = served
        self._max_line_bytes = max_line_bytes
        self._seen: set[bytes] = set()

    def __iter__(self) -> Iterator[BatchLine | BadLine]:
        """Yield every line that is not blank. Raises: ConfigError when the file cannot be read at all."""
        with _open_input(self._path) as file:
            hashing = _HashingFile(file)
            stored = io.BufferedReader(hashing, _BUFFER_BYTES)
            yield from map(self._parse, self._number_lines(self._content(stored)))
            while stored.read(_BUFFER_BYTES):
                pass  # what follows a damaged gzip stream belongs to the hash too
            self.sha256 = hashing.sha256.hexdigest()

    def _content(self, stored: io.BufferedReader[Any]) -> io.BufferedReader[Any]:
        mark = stored.peek(3)[:3]
        if mark.startswith(_UTF16_MARKS):
            raise ConfigError(f"{self._path} is UTF-16 text; convert it first: iconv -f utf-16 -t utf-8")
        if mark.startswith(b"\x1f\x8b"):
            return io.BufferedReader(_InflatedFile(stored), _BUFFER_BYTES)
        return stored

    def _number_lines(self, content: io.BufferedReader[Any]) -> Iterator[tuple[int, bytes | RequestError]]:
        line_number = 0
        try:
            while line := content.readline(self._max_line_bytes + 1):
                line_number += 1
                if len(line) > self._max_line_bytes and not line.endswith(b"\n"):
                    _skip_line(content)
                    yield line_number, self._too_long()
                elif (stripped := line.removeprefix(_UTF8_MARK) if line_number == 1 else line).strip():
                    yield line_number, stripped
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield line_number + 1, _line_error("truncated_input", f"the gzip stream is damaged from here on ({error})")

    def _too_long(self) -> RequestError:
        limit = self._max_line_bytes
        return _line_error("line_too_long", f"the line is longer than {limit} bytes; raise the limit or split the file")

    def _parse(self, numbered: tuple[int, bytes | RequestError]) -> BatchLine | BadLine:
        line_number, content = numbered
        self.num_lines += 1
        custom_id = None
        try:
            if isinstance(content, RequestError):
                raise content
            value = parse_json(content)
            custom_id = custom_id_of(value)
            if custom_id:
                self._check_first_use(custom_id)
            parse = parse_remote_line if self._served.is_remote else parse_line
            line = parse(value, line_number, self._served)
            self._check_model(line)
        except RequestError as error:
            return BadLine(line_number, custom_id, error)
        except RecursionError:  # deep enough to be read, too deep to be quoted or written again
            return BadLine(line_number, custom_id, _nested_too_deeply())
        return line

    def _check_first_use(self, custom_id: str) -> None:
        digest = hashlib.blake2b(custom_id.encode(), digest_size=15).digest()
        if digest in self._seen:
            raise _line_error(
                "duplicate_custom_id", f"custom_id {shown(custom_id)} is that of an earlier line", "custom_id"
            )
        self._seen.add(digest)

    def _check_model(self, line: BatchLine) -> None:
        """One file, one model: all names of the served model count as one. Mutates: `requested_model`."""
        if line.model is None or line.model in self._served.abilities.adapters:
            return
        if self.requested_model is None:
            self.requested_model = line.model
        if self._served.is_remote:  # its own server says which models it has
            return
        if line.model != self.requested_model and not {line.model, self.requested_model} <= set(self._served.names):
            raise _line_error(
                "mismatched_model",
                f"the line asks for model {shown(line.model)}, the file began with {shown(self.requested_model)}; "
                "a batch file is answered by one model: split it",
                "model",
            )


class _HashingFile(io.RawIOBase):
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


class _InflatedFile(io.RawIOBase):
    """A gzip stream in small reads: a read that spans damage would lose the good bytes before it."""

    def __init__(self, stored: io.BufferedReader[Any]) -> None:
        self._file = gzip.GzipFile(fileobj=stored, mode="rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        data = self._file.read1(len(view))
        view[: len(data)] = data
        return len(data)


def check_readable(path: Path) -> None:
    """Raises: ConfigError when a file is missing, is no regular file, or cannot be opened."""
    with _open_input(path):
        pass


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes as stored. Raises: ConfigError when it cannot be read."""
    with _open_input(path) as file:
        return hashlib.file_digest(cast(io.BytesIO, file), "sha256").hexdigest()


def parse_json(line: bytes) -> object:
    """Parse one line strictly. Raises: RequestError saying where and why it is no JSON that can be answered."""
    try:
        value = _DECODER.decode(line.decode())
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _line_error("invalid_json_line", f"byte {error.start} of the line is not UTF-8") from None
    except UnicodeEncodeError:
        raise _line_error("invalid_json_line", "the line holds half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise _line_error("invalid_json_line", f"no valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise _line_error("invalid_json_line", f"no valid JSON: {error}") from None
    except RecursionError:
        raise _nested_too_deeply() from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"key {shown(twice)} appears twice in one object")
    return result


def _reject_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_reject_constant)


def _line_error(code: str, message: str, param: str | None = None) -> RequestError:
    return RequestError(message, code=code, param=param, status_code=0)


def _nested_too_deeply() -> RequestError:
    return _line_error("invalid_json_line", "the JSON is nested too deeply")


def _skip_line(content: io.BufferedReader[Any]) -> None:
    while (rest := content.readline(_BUFFER_BYTES)) and not rest.endswith(b"\n"):
        pass


@contextmanager
def _open_input(path: Path) -> Iterator[io.RawIOBase]:
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

"""multipart/form-data as a stream: one file goes to its blob as it comes, small fields to a dictionary.

What comes is bounded in every direction: the size of the file, of all fields, of headers, and the number of parts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from python_multipart import multipart
from python_multipart.exceptions import FormParserError

from blendserve.serve.blobs import BlobWriter
from blendserve.serve.failures import ApiError, invalid

MAX_PARTS = 32
MAX_FIELD_BYTES = 64 << 10
MAX_NAME_BYTES = 1024
_FLUSH_BYTES = 1 << 20


@dataclass(slots=True)
class Form:
    """What a form held. `filename` is None where there was no file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    content_type: str = ""


def boundary_of(content_type: str | None) -> bytes:
    """Raises: ApiError when a body is no multipart form."""
    kind, options = multipart.parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 200:
        raise invalid(
            "The body must be a multipart form: Content-Type: multipart/form-data; boundary=...", code="invalid_form"
        )
    return boundary


async def read_form(
    chunks: AsyncIterator[bytes],
    boundary: bytes,
    file_field: str,
    writer: BlobWriter,
    check_size: Callable[[int], None],
) -> Form:
    """Read a form to its end; its file goes to `writer`. `check_size` is asked before every write, with the size that
    the file will have then.

    Raises: ApiError for a broken form; CapacityError. The caller aborts the writer then.
    """
    reader = _FormReader(file_field)
    parser = multipart.MultipartParser(boundary, reader.callbacks(), max_header_count=8, max_header_size=4096)
    try:
        async for chunk in chunks:
            if reader.is_complete:
                continue  # an epilogue, which means nothing
            parser.write(chunk)
            if len(reader.waiting) >= _FLUSH_BYTES:
                await _flush(reader, writer, check_size)
        await _flush(reader, writer, check_size)
        parser.finalize()
    except (FormParserError, ValueError, UnicodeDecodeError) as error:
        raise invalid(f"The multipart form is broken: {str(error)[:200]}.", code="invalid_form") from None
    if not reader.is_complete:
        raise invalid("The multipart form ends before its last boundary; send it whole.", code="invalid_form")
    return reader.form


async def _flush(reader: _FormReader, writer: BlobWriter, check_size: Callable[[int], None]) -> None:
    if reader.waiting:
        data = bytes(reader.waiting)
        reader.waiting.clear()
        check_size(writer.num_bytes + len(data))
        await asyncio.to_thread(writer.write, data)


class _FormReader:
    """The parser's callbacks. Data of the file waits in `waiting` until the caller writes it."""

    def __init__(self, file_field: str) -> None:
        self.form = Form()
        self.waiting = bytearray()
        self.is_complete = False
        self._file_field = file_field
        self._num_parts = 0
        self._num_field_bytes = 0
        self._header = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._name: str | None = None
        self._value = bytearray()

    def callbacks(self) -> multipart.MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, begin, end: self._header[0].extend(data[begin:end]),
            "on_header_value": lambda data, begin, end: self._header[1].extend(data[begin:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise invalid(f"The form has more than {MAX_PARTS} parts.", code="invalid_form")
        self._headers, self._value = {}, bytearray()

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        kind, options = multipart.parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name")
        if kind != b"form-data" or name is None:
            raise invalid("A part of the form has no name in its Content-Disposition.", code="invalid_form")
        self._name = name.decode()
        is_file = self._name == self._file_field
        if is_file and self.form.filename is not None:
            raise invalid(f"The form has two parts called {self._file_field!r}; send one file.", code="invalid_form")
        if is_file:
            self.form.filename = safe_filename(options.get(b"filename", b"").decode(errors="replace"))
            self.form.content_type = self._headers.get(b"content-type", b"").decode(errors="replace")[:200]

    def _data(self, data: bytes, begin: int, end: int) -> None:
        if self._name == self._file_field:
            self.waiting += memoryview(data)[begin:end]
            return
        self._num_field_bytes += end - begin
        if self._num_field_bytes > MAX_FIELD_BYTES:
            raise invalid(f"The fields of the form have more than {MAX_FIELD_BYTES} bytes.", code="invalid_form")
        self._value += memoryview(data)[begin:end]

    def _end(self) -> None:
        if self._name is not None and self._name != self._file_field:
            if self._name in self.form.fields:
                raise invalid(f"The form has the field {self._name[:80]!r} twice.", code="invalid_form")
            self.form.fields[self._name] = self._value.decode()
        self._name = None

    def _finish(self) -> None:
        self.is_complete = True


def safe_filename(name: str) -> str:
    """A name to show. It never becomes a path: no directories, no control characters, at most 255 characters."""
    last = name.replace("\\", "/").rpartition("/")[2]
    shown = "".join(character for character in last if character.isprintable()).strip(". ")
    return shown[:255] or "file"


async def watched(stream: AsyncIterator[bytes], stall_s: float) -> AsyncIterator[bytes]:
    """The chunks of a body. Raises: ApiError when the client sends nothing for `stall_s` seconds."""
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream), stall_s)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(408, f"Nothing came for {stall_s:g} seconds; send the file again.", code="timeout") from None
        yield chunk

"""The container of a GGUF file: its metadata and where each tensor lies, memory-mapped.

Read here because the `gguf` package builds an array per string, which takes seconds for a vocabulary. Knows nothing of
architectures; `gguf_weights`, `gguf_tokenizer` and `spec` give the keys their meaning. Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.errors import ConfigError
from blendserve.models.spec import brief

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRUCT_BY_TYPE = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")

# ggml type -> (name, elements per block, bytes per block), those we can dequantise.
_BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in rows-first order (GGUF stores it reversed); `kind` is ggml's type name."""

    name: str
    kind: str
    shape: tuple[int, ...]
    row_bytes: int
    offset: int


class GgufFile:
    """Metadata and tensors of one GGUF file. `tensor_bytes` borrows from the mapping, which lives as long as this.

    Raises: ConfigError when the file is not GGUF, is cut short, or holds a tensor type that we cannot read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        reader = _Reader(self._map)
        try:
            self.metadata, self.tensor_by_name = _read(path, reader)
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError, RecursionError, MemoryError) as error:
            reason = f"it ends within {brief(str(error))}" if isinstance(error, MemoryError) else brief(error)
            raise ConfigError(
                f"{path} is a damaged GGUF file ({reason}, byte {reader.at}); download it again"
            ) from error

    def tensor_bytes(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        """The stored bytes of a tensor. Shapes: [rows, bytes per row] of all but its last dimension."""
        rows = math.prod(tensor.shape[:-1])
        stored = np.frombuffer(self._map, np.uint8, count=rows * tensor.row_bytes, offset=tensor.offset)
        return stored.reshape(rows, tensor.row_bytes)


class _Reader:
    """A cursor over mapped bytes; every read moves `at`. Raises: struct.error or MemoryError past the end."""

    def __init__(self, source: mmap.mmap) -> None:
        self.source = source
        self.at = 0

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.source, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        (length,) = _LENGTH.unpack_from(self.source, self.at)
        begin = self.at + 8
        if length > len(self.source) - begin:
            raise MemoryError(f"a string of {length} bytes")
        self.at = begin + length
        return self.source[begin : self.at].decode("utf-8")

    def strings(self, count: int) -> list[str]:
        """Same as `string` in a loop, without a call per item: a vocabulary has 100,000 of them."""
        source, at, unpack, values = self.source, self.at, _LENGTH.unpack_from, []
        for _ in range(count):
            (length,) = unpack(source, at)
            at += 8
            if length > len(source) - at:
                raise MemoryError(f"a string of {length} bytes")
            values.append(source[at : at + length].decode("utf-8", errors="replace"))
            at += length
        self.at = at
        return values

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_STRUCT_BY_TYPE[kind])
        item_kind, count = self.scalar("<I"), self.scalar("<Q")
        if count > len(self.source) - self.at:
            raise MemoryError(f"an array of {count} items")
        if item_kind == _STRING:
            return self.strings(count)
        if item_kind == _ARRAY:
            return [self.value(_ARRAY) for _ in range(count)]
        form = f"<{count}{_STRUCT_BY_TYPE[item_kind][-1]}"
        values = struct.unpack_from(form, self.source, self.at)
        self.at += struct.calcsize(form)
        return list(values)


def _read(path: Path, reader: _Reader) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if reader.source[:4] != _MAGIC:
        raise ConfigError(f"{path} is not a GGUF file: it begins with {reader.source[:4]!r}, not {_MAGIC!r}")
    reader.at = 4
    version, num_tensors, num_keys = reader.scalar("<I"), reader.scalar("<Q"), reader.scalar("<Q")
    if version not in _VERSIONS:
        raise ConfigError(f"{path} is GGUF version {version}; supported, little-endian: {_VERSIONS}")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("<I"))
    headers = [_tensor_header(path, reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ConfigError(
            f"{path}: general.alignment is {brief(alignment)}; it must be from 1 up: download the file again"
        )
    data_start = -(-reader.at // alignment) * alignment
    tensors = [_placed(path, header, data_start, len(reader.source)) for header in headers]
    tensor_by_name = {tensor.name: tensor for tensor in tensors}
    if len(tensor_by_name) != len(tensors):
        raise ConfigError(f"{path} is damaged: it names a tensor twice; download it again")
    return metadata, tensor_by_name


def _tensor_header(path: Path, reader: _Reader) -> GgufTensor:
    name, num_dims = reader.string(), reader.scalar("<I")
    shape = tuple(reversed([reader.scalar("<Q") for _ in range(num_dims)])) or (1,)
    type_id, offset = reader.scalar("<I"), reader.scalar("<Q")
    if type_id not in _BLOCKS:
        known = ", ".join(kind for kind, _, _ in _BLOCKS.values())
        raise ConfigError(f"{path}: tensor {brief(name)} has ggml type {type_id}; supported: {known}")
    kind, block_size, block_bytes = _BLOCKS[type_id]
    if shape[-1] % block_size:
        raise ConfigError(
            f"{path}: tensor {brief(name)} has rows of {shape[-1]}, not a multiple of {kind}'s {block_size}"
        )
    return GgufTensor(name, kind, shape, shape[-1] // block_size * block_bytes, offset)


def _placed(path: Path, header: GgufTensor, data_start: int, num_file_bytes: int) -> GgufTensor:
    """The tensor with its offset counted from the beginning of the file."""
    offset = data_start + header.offset
    end = offset + math.prod(header.shape[:-1]) * header.row_bytes
    if end > num_file_bytes:
        raise ConfigError(
            f"{path} is cut short: tensor {brief(header.name)} ends at byte {end} of {num_file_bytes}; download it "
            "again"
        )
    return GgufTensor(header.name, header.kind, header.shape, header.row_bytes, offset)

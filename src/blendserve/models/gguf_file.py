"""The container of a GGUF file: its metadata and where each tensor lies, memory-mapped.

Read here because the `gguf` package builds an array per string, which takes seconds for a vocabulary. Knows nothing of
architectures; `gguf_weights`, `gguf_tokenizer` and `spec` give the keys their meaning. Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.errors import ConfigError
from blendserve.models.hub import split_names
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
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
_NAME_OF_OTHERS = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 40: "NVFP4", 41: "Q1_0"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in rows-first order (GGUF stores it reversed); `kind` is ggml's type name."""

    name: str
    kind: str
    shape: tuple[int, ...]
    row_bytes: int
    offset: int
    part: int = 0


class GgufFile:
    """Metadata and tensors of a GGUF file, all parts of a split one included. `tensor_bytes` borrows from the mappings,
    which live as long as this.

    Raises: ConfigError when a file is not GGUF, is cut short, or holds a tensor type that we cannot read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        source, self.metadata, self.tensor_by_name = _opened(path)
        self._maps = [source]
        for number, part in enumerate(_other_parts(path, self.metadata), start=1):
            source, metadata, tensor_by_name = _opened(part)
            if metadata.get("split.no") != number:
                raise ConfigError(f"{part} is not part {number + 1} of {path}; download it again")
            if again := sorted(self.tensor_by_name.keys() & tensor_by_name.keys()):
                raise ConfigError(f"{part} holds the tensor {brief(again[0])} a second time; download it again")
            self.tensor_by_name |= {name: replace(tensor, part=number) for name, tensor in tensor_by_name.items()}
            self._maps.append(source)

    def tensor_bytes(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        """The stored bytes of a tensor. Shapes: [rows, bytes per row] of all but its last dimension."""
        rows = math.prod(tensor.shape[:-1])
        source = self._maps[tensor.part]
        stored = np.frombuffer(source, np.uint8, count=rows * tensor.row_bytes, offset=tensor.offset)
        return stored.reshape(rows, tensor.row_bytes)


def _opened(path: Path) -> tuple[mmap.mmap, dict[str, Any], dict[str, GgufTensor]]:
    """A file's bytes, metadata and tensors."""
    try:
        with path.open("rb") as file:
            source = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    reader = _Reader(source)
    try:
        return (source, *_read(path, reader))
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"{path} is a damaged GGUF file ({_damage(error)}, byte {reader.at}); download it again"
        ) from error


def _damage(error: Exception) -> str:
    """What reading has met."""
    if isinstance(error, MemoryError):
        return f"it ends within {brief(str(error))}"
    if isinstance(error, struct.error):
        return "it ends within a number"
    if isinstance(error, KeyError):
        return f"a value of the unknown type {error}"
    return "a text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else "a number beyond all bounds"


def _other_parts(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """The parts after the first of a split model. Raises: ConfigError when `path` is not the first."""
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if type(count) is not int or type(number) is not int:
        raise ConfigError(
            f"{path} is damaged: split.count is {brief(count)}, split.no {brief(number)}; download it again"
        )
    if count <= 1:
        return []
    names = split_names(path.name)
    if len(names) != count:
        raise ConfigError(
            f"{path} is part {number + 1} of {count}; its name must end in -{number + 1:05}-of-{count:05}.gguf, and the"
            " other parts must be beside it"
        )
    if number or path.name != names[0]:
        raise ConfigError(f"{path} is part {number + 1} of {count}; give the first part, {path.with_name(names[0])}")
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise ConfigError(
            f"{path} is part 1 of {count}, and {missing[0]} is not beside it; download the other parts too"
        )
    return [path.with_name(name) for name in names[1:]]


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
        kind = (
            f"{_NAME_OF_OTHERS[type_id]} (ggml type {type_id})"
            if type_id in _NAME_OF_OTHERS
            else f"ggml type {type_id}"
        )
        raise ConfigError(f"{path}: tensor {brief(name)} has {kind}, which is not supported; supported: {known}")
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

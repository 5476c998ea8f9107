"""Weights from a Hugging Face directory of `*.safetensors` files, memory-mapped and read tensor by tensor.

The format is read here (an eight-byte length, a JSON header, raw little-endian tensors): the package of the same name
hands bfloat16 over only to frameworks that we do not depend on.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from blendserve.errors import ConfigError
from blendserve.models.spec import brief
from blendserve.models.weights import Floats

_BYTES_BY_DTYPE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_SHOWN = 120
_LFS_POINTER = b"version https://git-lfs"

_NAME_BY_STEM = {
    "input_layernorm": "input_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "o_proj",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.gate_proj": "gate_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "down_proj",
}
_TOP_NAMES = {"model.embed_tokens.weight": "embed_tokens", "model.norm.weight": "norm", "lm_head.weight": "lm_head"}
_ROW_PER_TOKEN = ("embed_tokens", "lm_head")
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _BYTES_BY_DTYPE[self.dtype]


class SafetensorsWeights:
    """Weights of a directory: model.safetensors, or the files that model.safetensors.index.json names. Of the rows of
    the embedding and the head, `vocab_size` count: padding after them is left out.

    Raises: ConfigError when a file is missing, damaged, or holds a type of number that we do not read.
    """

    def __init__(self, directory: Path, has_tied_embeddings: bool, vocab_size: int | None = None) -> None:
        self._entry_by_name: dict[str, _Entry] = {}
        self._map_by_path: dict[Path, mmap.mmap] = {}
        paths, file_by_tensor = _weight_files(directory)
        for path in paths:
            self._map_by_path[path] = _map_file(path)
            for entry_name, entry in _read_header(path, self._map_by_path[path]).items():
                name = _our_name(entry_name)
                if file_by_tensor.get(entry_name, path.name) != path.name:
                    continue  # the index takes it from another file
                if name.endswith("rotary_emb.inv_freq") or (name == "lm_head" and has_tied_embeddings):
                    continue  # a buffer of old checkpoints; a second copy of the embedding
                if name in self._entry_by_name:
                    raise ConfigError(
                        f"tensor {brief(entry_name)} is in {self._entry_by_name[name].path} and {path}; remove the "
                        "file that is not of the model"
                    )
                if vocab_size is not None and name in _ROW_PER_TOKEN and entry.shape and entry.shape[0] > vocab_size:
                    entry = replace(entry, shape=(vocab_size, *entry.shape[1:]))
                self._entry_by_name[name] = entry

    @property
    def shape_by_name(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entry_by_name.items()}

    def tensor(self, name: str, /) -> Floats:
        entry = self._entry_by_name.get(name)
        if entry is None:
            raise ConfigError(
                f"the model's files have no tensor {name!r}, only {len(self._entry_by_name)} others; download it again"
            )
        count = math.prod(entry.shape)
        source = self._map_by_path[entry.path]
        return _to_float32(source, entry.dtype, count, entry.offset).reshape(entry.shape)


def _to_float32(source: mmap.mmap, dtype: str, count: int, offset: int) -> Floats:
    if dtype == "BF16":
        bits = np.frombuffer(source, dtype="<u2", count=count, offset=offset).astype(np.uint32)
        return np.left_shift(bits, np.uint32(16), out=bits).view(np.float32)
    stored = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
    return np.frombuffer(source, dtype=stored, count=count, offset=offset).astype(np.float32)


def _our_name(name: str) -> str:
    """The project's name of a tensor, or the given one where it has none."""
    if match := _LAYER_NAME.fullmatch(name):
        layer, stem, kind = match.groups()
        if stem in _NAME_BY_STEM:
            return f"layers.{layer}.{_NAME_BY_STEM[stem]}" + (".bias" if kind == "bias" else "")
    return _TOP_NAMES.get(name, name)


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that transformers would take, and what the index says of the place of tensors. They are
    model.safetensors, or else those that the index names: whatever else lies in the directory (adapters, other formats
    of the same weights, old shards) is no part of the model.
    """
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole], {}
    if not index.is_file():
        raise ConfigError(
            f"{directory} has no model.safetensors and no index of several such files; {_remedy(directory)}"
        )
    try:
        file_by_tensor = dict(json.loads(index.read_bytes())["weight_map"])
        names = sorted(set(file_by_tensor.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{outside[0]!r} is no file of this directory")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{index} is not an index of safetensors files ({brief(error)}); download it again"
        ) from error
    missing = [name for name in names if not (directory / name).is_file()]
    if missing or not names:
        raise ConfigError(f"{directory} lacks {', '.join(missing[:5]) or 'weights'}; download the model again")
    return [directory / name for name in names], file_by_tensor


def _remedy(directory: Path) -> str:
    """What to do with the weights that are there instead."""
    if others := sorted(path.name for path in directory.glob("*.safetensors")):
        return (
            f"it has {brief(', '.join(others))}: download model.safetensors, or model.safetensors.index.json and the "
            "files that it names"
        )
    if any(directory.glob("*.bin")):
        return (
            'it has weights of PyTorch; convert them with transformers: python -c "from transformers import '
            f'AutoModelForCausalLM as A; A.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"'
        )
    return "download the model again"


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _read_header(path: Path, source: mmap.mmap) -> dict[str, _Entry]:
    if source[: len(_LFS_POINTER)] == _LFS_POINTER:
        raise ConfigError(f"{path} is a pointer of Git LFS, not the file itself; fetch it: git lfs pull")
    length = int.from_bytes(source[:8], "little")
    if len(source) < 8 or length > min(_MAX_HEADER_BYTES, len(source) - 8):
        raise ConfigError(f"{path} is not a safetensors file, or is cut short ({len(source)} bytes); download it again")
    try:
        header = json.loads(source[8 : 8 + length], object_pairs_hook=_unique_keys)
        header.pop("__metadata__", None)
        entries = {name: _checked_entry(path, len(source), 8 + length, name, value) for name, value in header.items()}
        _check_apart(entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} has a damaged safetensors header ({_damage(error)}); download it again") from error
    return entries


def _damage(error: Exception) -> str:
    """What reading has met."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, KeyError):
        return f"an entry has no {error}"
    if isinstance(error, ValueError):
        text = str(error)
        return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
    return "an entry is not what it must be"


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name appears twice")
    return values


def _check_apart(entries: Mapping[str, _Entry]) -> None:
    """Raises: ValueError where two tensors share bytes: each of a billion could be as large as the file."""
    placed = sorted((entry.offset, entry.offset + entry.num_bytes, name) for name, entry in entries.items())
    for (_, end, name), (begin, _, other) in pairwise(placed):
        if begin < end:
            raise ValueError(f"{name!r} and {other!r} share bytes")


def _checked_entry(path: Path, num_file_bytes: int, data_start: int, name: str, value: Mapping[str, object]) -> _Entry:
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"entry of {name!r} is {value!r}")
    if dtype not in _BYTES_BY_DTYPE:
        raise ConfigError(f"{path}: tensor {brief(name)} is {brief(dtype)}; supported: {', '.join(_BYTES_BY_DTYPE)}")
    if any(type(number) is not int for number in (*shape, *offsets)):
        raise ValueError(f"entry of {name!r} is {value!r}")
    begin, end = offsets
    num_bytes = math.prod(shape) * _BYTES_BY_DTYPE[dtype]
    if begin < 0 or min(shape, default=1) < 0 or end - begin != num_bytes or data_start + end > num_file_bytes:
        raise ValueError(f"{name!r} {shape} takes bytes [{begin}, {end}) of {num_file_bytes - data_start}")
    return _Entry(path, dtype, tuple(shape), data_start + begin)

"""Models whose files are not what they seem: one change at a time, by seed."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from blendserve.config import EngineConfig
from blendserve.engine.limits import resolve_limits
from blendserve.errors import BlendServeError
from blendserve.models.conversation import Conversation
from blendserve.models.gguf_file import GgufFile
from blendserve.models.hub import ModelFiles
from blendserve.models.load import load_model
from blendserve.models.rope import inverse_frequencies

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**31, 2**63, 2**70, -(2**63), 10**400),
    *(0.0, -0.5, 1e-30, 1e30, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", "x", "\x1b]0;x\x07", "llama", "10", "../x", "/dev/zero", "{{ 1 // 0 }}", "{% for", "{{ 'a' * 10**10 }}"),
    *(
        [],
        {},
        [None],
        [1, 2],
        ["x"],
        [[]],
        [[0, 1]],
        {"a": 1},
        {"content": 3},
        {"type": "linear"},
        {"rope_type": "llama3"},
    ),
)
FILE_NAMES = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json", "model.safetensors")
MESSAGES = [{"role": "user", "content": "the capital of france"}]


def changed_json(value: Any, source: random.Random) -> Any:
    """The value with one of its parts replaced, removed or added."""
    whole = copy.deepcopy(value)
    spots = [
        (holder, key)
        for holder in _holders(whole)
        for key in (holder if isinstance(holder, dict) else range(len(holder)))
    ]
    holder, key = spots[source.randrange(len(spots))]
    kind = source.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[source.choice(("x", "quantization_config", "layer_types", "rope_parameters"))] = source.choice(VALUES)
    elif kind == 2 and isinstance(holder[key], int):
        holder[key] += source.choice((-1, 1, 1 << source.randrange(40)))
    else:
        holder[key] = source.choice(VALUES)
    return whole


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list) and value:
        yield value
        for part in list(value.values() if isinstance(value, dict) else value[:50]):
            yield from _holders(part)


def changed_bytes(content: bytes, source: random.Random, first: int, end: int) -> bytes:
    """Up to four bytes of [first, end) replaced."""
    changed = bytearray(content)
    for _ in range(source.randrange(1, 5)):
        changed[source.randrange(first, end)] = source.choice((0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)))
    return bytes(changed)


def changed_safetensors(content: bytes, source: random.Random) -> bytes:
    """Another header, of its own length, before the same data; or other bytes in it."""
    (length,) = struct.unpack_from("<Q", content)
    if source.random() < 0.3:
        return changed_bytes(content, source, 0, 8 + length)
    header = json.loads(content[8 : 8 + length])
    data = json.dumps(changed_json(header, source)).encode()
    return struct.pack("<Q", len(data)) + data + content[8 + length :]


@dataclass(frozen=True)
class GgufParts:
    """A GGUF file, in pieces."""

    metadata: dict[str, Any]
    tensor_headers: bytes
    data: bytes
    content: bytes

    @classmethod
    def of(cls, path: Path) -> GgufParts:
        reader, content = gguf.GGUFReader(path), path.read_bytes()
        first, last = reader.tensors[0].field, reader.tensors[-1].field
        end = last.offset + sum(part.nbytes for part in last.parts)
        headers = content[first.offset : end]
        return cls(GgufFile(path).metadata, headers, content[reader.data_offset :], content)

    def changed(self, source: random.Random) -> bytes:
        """Other metadata or tensors before the same data, or other bytes in the header."""
        num_header_bytes = len(self.content) - len(self.data)
        if source.random() < 0.3:
            return changed_bytes(self.content, source, 4, num_header_bytes)
        metadata = changed_json(self.metadata, source)
        fields = b"".join(_gguf_string(key) + _gguf_value(value) for key, value in metadata.items())
        headers = self.tensor_headers
        if source.random() < 0.2:
            headers = changed_bytes(headers, source, 0, len(headers))
        head = self.content[:16] + struct.pack("<Q", len(metadata)) + fields + headers
        return head + bytes(-len(head) % 32) + self.data


def _gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _gguf_value(value: Any) -> bytes:
    """Type and value; what GGUF has no type for becomes a text."""
    if isinstance(value, list) and value and all(type(item) is type(value[0]) for item in value):
        items = [_gguf_value(item) for item in value]
        return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return struct.pack("<Iq", 11, value) if value < 2**63 else struct.pack("<IQ", 10, value)
    return struct.pack("<I", 8) + _gguf_string(str(value)[:100] if not isinstance(value, str) else value)


def mutate(directory: Path, source: random.Random) -> str:
    """Change one file of a model directory. Returns: its name."""
    name = source.choice(
        ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json", "model.safetensors")
    )
    path = directory / name
    content = path.read_bytes()
    if name == "model.safetensors":
        path.write_bytes(changed_safetensors(content, source))
    elif source.random() < 0.1:
        path.write_bytes(changed_bytes(content, source, 0, len(content)))
    else:
        path.write_text(json.dumps(changed_json(json.loads(content), source)))
    return name


def use(path: Path) -> str:
    """Load a model and ask for all that loading promises. Returns: how it ended; everything but an error of ours is
    raised.
    """
    try:
        model = load_model(ModelFiles("hostile", path))
        resolve_limits(EngineConfig(kv_memory_bytes=1 << 22), model.spec)
        inverse_frequencies(model.spec)
        for name in model.weights.shape_by_name:
            model.weights.tensor(name)
        model.tokenizer.encode_each([MESSAGES[0]["content"]])
        if model.tokenizer.has_chat_template:
            model.tokenizer.render_each([Conversation(tuple(MESSAGES))])
    except BlendServeError as error:
        return type(error).__name__ if len(str(error)) < 2000 else "an endless message"
    return "loaded"


def copy_of(directory: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target)
    return target

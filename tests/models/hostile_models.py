"""Models whose files are not what they seem: one change at a time, by seed."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import safetensors.numpy
from tiny_files import write_directory
from tiny_models import random_weights, tiny_spec

from blendserve.config import EngineConfig
from blendserve.engine.limits import resolve_limits
from blendserve.errors import BlendServeError, RequestError
from blendserve.models.conversation import Conversation
from blendserve.models.fingerprint import fingerprint
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
ADDED_KEYS = (
    *("x", "quantization_config", "layer_types", "rope_parameters", "rope_scaling", "sliding_window", "head_dim"),
    *("added_tokens_decoder", "extra_special_tokens", "chat_template", "eos_token", "eos_token_id", "temperature"),
    *("general.alignment", "split.count", "tokenizer.ggml.scores", "llama.rope.scaling.type", "weight_map"),
)
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
        holder[source.choice(ADDED_KEYS)] = source.choice(VALUES)
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
        headers = self.tensor_headers
        if source.random() < 0.2:
            headers = changed_bytes(headers, source, 0, len(headers))
        return self._with(changed_json(self.metadata, source), headers)

    def with_metadata(self, metadata: dict[str, Any]) -> GgufParts:
        """The same tensors under other metadata."""
        return replace(self, metadata=metadata, content=self._with(metadata, self.tensor_headers))

    def _with(self, metadata: Mapping[str, Any], headers: bytes) -> bytes:
        fields = b"".join(gguf_string(key) + gguf_value(value) for key, value in metadata.items())
        head = self.content[:16] + struct.pack("<Q", len(metadata)) + fields + headers
        return head + bytes(-len(head) % 32) + self.data


def gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: Any) -> bytes:
    """Type and value; what GGUF has no type for becomes a text."""
    if isinstance(value, list) and value and all(type(item) is type(value[0]) for item in value):
        items = [gguf_value(item) for item in value]
        return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return struct.pack("<Iq", 11, value) if value < 2**63 else struct.pack("<IQ", 10, value)
    return struct.pack("<I", 8) + gguf_string(str(value)[:100] if not isinstance(value, str) else value)


class HostileDirectory:
    """A model directory of which one file at a time is changed, and put back afterwards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content_by_name = {file.name: file.read_bytes() for file in sorted(path.iterdir())}

    @classmethod
    def written(cls, path: Path, *, lists_added_tokens: bool) -> HostileDirectory:
        """A tiny model with every file that we read; its tokens are listed in one file or in two."""
        spec = tiny_spec("llama3-rope")
        write_directory(path, spec, random_weights(spec))
        split_weights(path)
        settings = json.loads((path / "tokenizer_config.json").read_text())
        sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], **sampling}))
        if lists_added_tokens:
            named = [{"name": "default", "template": settings["chat_template"]}, {"name": "tool_use", "template": "T"}]
            settings["chat_template"] = named
            settings["added_tokens_decoder"] = {
                "0": {"content": "<unk>", "special": True, "lstrip": False},
                "320": {"content": "<think>", "special": False, "normalized": True},
            }
        else:
            special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "additional_special_tokens": ["<x>"]}
            (path / "special_tokens_map.json").write_text(json.dumps(special))
            (path / "added_tokens.json").write_text(json.dumps({"<x>": 320, "<think>": 321}))
            (path / "chat_template.jinja").write_text(settings.pop("chat_template"))
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        return cls(path)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._content_by_name)

    def value_of(self, name: str) -> Any:
        """What a JSON file holds."""
        return json.loads(self._content_by_name[name])

    def change(self, source: random.Random) -> str:
        """Change one file. Returns: its name."""
        name = source.choice(self.names)
        content = self._content_by_name[name]
        if name.endswith(".safetensors"):
            changed = changed_safetensors(content, source)
        elif name.endswith(".jinja") or source.random() < 0.1:
            changed = changed_bytes(content, source, 0, len(content))
        else:
            changed = json.dumps(changed_json(json.loads(content), source)).encode()
        (self.path / name).write_bytes(changed)
        return name

    def restore(self, name: str) -> None:
        (self.path / name).write_bytes(self._content_by_name[name])


def split_weights(path: Path) -> None:
    """Two files of weights and their index in the place of one."""
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    file_by_tensor = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(tensors)}
    for file in sorted(set(file_by_tensor.values())):
        part = {name: tensor for name, tensor in tensors.items() if file_by_tensor[name] == file}
        safetensors.numpy.save_file(part, path / file)
    index = {"metadata": {"total_size": 1}, "weight_map": file_by_tensor}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def use(path: Path, *, renders: bool = True) -> str:
    """Load a model and ask for all that loading promises; a template runs in a process of its own, which takes time.

    Returns: how it ended; everything but an error of ours is raised.
    """
    try:
        files = ModelFiles("hostile", path)
        model = load_model(files)
        fingerprint(files)
        resolve_limits(EngineConfig(kv_memory_bytes=1 << 22), model.spec)
        inverse_frequencies(model.spec)
        for name in model.weights.shape_by_name:
            model.weights.tensor(name)
        tokenizer = model.tokenizer
        outcomes = tokenizer.encode_each([MESSAGES[0]["content"], "<think></s>"])
        for outcome in outcomes:
            if not isinstance(outcome, RequestError):
                tokenizer.decode(outcome)
        if renders and tokenizer.has_chat_template:
            tokenizer.render_each([Conversation(tuple(MESSAGES))])
    except BlendServeError as error:
        return type(error).__name__ if len(str(error)) < 2000 and "\n" not in str(error) else "no single line"
    return "loaded"

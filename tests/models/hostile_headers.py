"""Readers of model files, each with a small file of its kind and changes of it by seed. No weights are read."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from hostile_models import GgufParts, changed_bytes, changed_json, changed_safetensors
from tiny_files import CHAT_TEMPLATE, hf_config, write_directory, write_gguf
from tiny_models import random_weights, tiny_spec
from tokenizers import decoders, models, pre_tokenizers

from blendserve.config import EngineConfig
from blendserve.engine.limits import resolve_limits
from blendserve.errors import BlendServeError, RequestError
from blendserve.models.generation_config import sampling_defaults
from blendserve.models.gguf_file import GgufFile
from blendserve.models.gguf_spec import spec_from_gguf
from blendserve.models.gguf_tokenizer import tokenizer_from_gguf
from blendserve.models.gguf_weights import GgufWeights
from blendserve.models.hf_config import spec_from_hf_config
from blendserve.models.hub import ModelFiles
from blendserve.models.rope import inverse_frequencies
from blendserve.models.safetensors import SafetensorsWeights
from blendserve.models.spec import ModelSpec
from blendserve.models.tokenizer import Tokenizer, read_json
from blendserve.models.tokenizer_directory import tokenizer_from_directory
from blendserve.models.weights import check_weights

ROPES = ("llama3-rope", "yarn-rope", "longrope", "linear-rope", "qwen2", "qwen3")
TEXTS = ("the end", "a <x></s> b\x00\ud800")
TOKENS = ("<unk>", "<s>", "</s>", "Ġ", *"abcdefghijklmnopqrstuvwxyz", "th")
"""A vocabulary with one merge: long lists take time and are all alike."""


class Reader(Protocol):
    """What reads one kind of file."""

    name: str

    def change(self, source: random.Random) -> str:
        """Write a changed file. Returns: what was changed."""
        ...

    def read(self) -> str:
        """Returns: "read" or "refused"; all but a clear error of ours is raised."""
        ...


def end_of(read: Callable[[], None]) -> str:
    """How reading ended. Raises: what is no error of ours; AssertionError for one of ours that is no single line."""
    try:
        read()
    except BlendServeError as error:
        text = str(error)
        assert 0 < len(text) < 2000, f"an error of {len(text)} characters: {text[:300]!r}"
        assert "\n" not in text, f"an error of several lines: {text[:300]!r}"
        return "refused"
    return "read"


def changed_text(value: Any, source: random.Random) -> bytes:
    """JSON with one of its parts or a few of its bytes changed."""
    if source.random() < 0.2:
        content = json.dumps(value).encode()
        return changed_bytes(content, source, 0, len(content))
    return json.dumps(changed_json(value, source)).encode()


def small_spec(name: str = "llama", **changes: Any) -> ModelSpec:
    sizes = {"num_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_kv_heads": 1}
    return tiny_spec(name, **sizes, **changes)


class ConfigReader:
    """config.json of every architecture and rule of rotary positions."""

    name = "config"

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._path = directory / "config.json"
        self._configs = [hf_config(small_spec(rope)) | {"transformers_version": "5.0"} for rope in ROPES]
        layers = {"layer_types": ["full_attention"], "use_sliding_window": False, "sliding_window": 8}
        self._configs[-1] |= {**layers, "rope_parameters": {"full_attention": {"rope_type": "default"}}}

    def change(self, source: random.Random) -> str:
        self._path.write_bytes(changed_text(source.choice(self._configs), source))
        return "config.json"

    def read(self) -> str:
        return end_of(self._read)

    def _read(self) -> None:
        spec = spec_from_hf_config("m", read_json(self._path))
        resolve_limits(EngineConfig(kv_memory_bytes=1 << 22), spec)
        inverse_frequencies(spec)


class TokenizerReader:
    """The files beside tokenizer.json: named and added tokens, chat templates, generation settings."""

    name = "tokenizer"

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        _small_tokenizer().save(str(directory / "tokenizer.json"))
        named = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "T"}]
        tokens = {"0": {"content": "<unk>", "special": True}, "90": {"content": "<think>", "normalized": True}}
        special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "additional_special_tokens": ["<x>"]}
        sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
        self._values: list[tuple[str, Any]] = [
            ("tokenizer_config.json", {**special, "chat_template": named, "added_tokens_decoder": tokens}),
            ("tokenizer_config.json", {**special, "chat_template": CHAT_TEMPLATE, "add_bos_token": True}),
            ("tokenizer_config.json", {**special, "extra_special_tokens": {"image_token": "<img>"}}),
            ("special_tokens_map.json", special),
            ("added_tokens.json", {"<x>": 90, "<think>": 91}),
            ("generation_config.json", {"eos_token_id": [2], "do_sample": True, **sampling}),
        ]

    def change(self, source: random.Random) -> str:
        for name, _ in self._values:
            (self._directory / name).unlink(missing_ok=True)
        name, value = source.choice(self._values)
        (self._directory / name).write_bytes(changed_text(value, source))
        return name

    def read(self) -> str:
        return end_of(self._read)

    def _read(self) -> None:
        use_tokenizer(tokenizer_from_directory(self._directory))
        sampling_defaults(ModelFiles("m", self._directory))


class SafetensorsReader:
    """The header of model.safetensors."""

    name = "safetensors"

    def __init__(self, directory: Path) -> None:
        self._directory, self._spec = directory, small_spec(vocab_size=320)
        write_directory(directory, self._spec, random_weights(self._spec))
        self._path = directory / "model.safetensors"
        content = self._path.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        self._head, self._data = content[: 8 + length], content[8 + length :]

    def change(self, source: random.Random) -> str:
        self._path.write_bytes(changed_safetensors(self._head, source) + self._data)
        return "the header of model.safetensors"

    def read(self) -> str:
        return end_of(self._read)

    def _read(self) -> None:
        weights = SafetensorsWeights(self._directory, has_tied_embeddings=False, vocab_size=self._spec.vocab_size)
        check_weights(self._spec, weights)
        for name in weights.shape_by_name:
            weights.tensor(name)


class GgufReader:
    """Metadata and tensor headers of a GGUF file."""

    name = "gguf"

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._path, spec = directory / "m.gguf", small_spec("llama3-rope")
        write_gguf(self._path, spec, random_weights(spec))
        parts = GgufParts.of(self._path)
        vocabulary = {"tokens": [*TOKENS], "token_type": [1, 3, 3, *[1] * (len(TOKENS) - 3)], "merges": ["t h"]}
        few = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
        self._parts = parts.with_metadata(parts.metadata | few)
        self._path.write_bytes(self._parts.content)

    def change(self, source: random.Random) -> str:
        self._path.write_bytes(self._parts.changed(source))
        return "the header of a GGUF file"

    def read(self) -> str:
        return end_of(self._read)

    def _read(self) -> None:
        file = GgufFile(self._path)
        spec = spec_from_gguf("m", file)
        resolve_limits(EngineConfig(kv_memory_bytes=1 << 22), spec)
        inverse_frequencies(spec)
        weights = GgufWeights(file, spec)
        use_tokenizer(tokenizer_from_gguf(file))
        check_weights(spec, weights)
        for name in weights.shape_by_name:
            weights.tensor(name)


def use_tokenizer(tokenizer: Tokenizer) -> None:
    for outcome in tokenizer.encode_each(TEXTS):
        if not isinstance(outcome, RequestError):
            tokenizer.decode(outcome)


def _small_tokenizer() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({text: at for at, text in enumerate(TOKENS)}, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(TOKENS[:3]))
    return backend


READERS: Mapping[str, Callable[[Path], Reader]] = {
    reader.name: reader for reader in (ConfigReader, TokenizerReader, SafetensorsReader, GgufReader)
}

"""A model directory or GGUF file with any one thing changed loads, or is refused in one line; nothing else happens."""

from __future__ import annotations

import json
import random
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
from hostile_headers import READERS
from hostile_models import VALUES, GgufParts, HostileDirectory, use
from tiny_files import hf_config, tiny_directory, write_gguf
from tiny_models import random_weights, tiny_spec

from blendserve.errors import ConfigError
from blendserve.models.gguf_file import GgufFile
from blendserve.models.hf_config import spec_from_hf_config
from blendserve.models.safetensors import SafetensorsWeights

NUM_CHANGES = [150, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.thorough])]
SPEC = tiny_spec("llama3-rope")


@pytest.mark.parametrize("lists_added_tokens", [False, True])
@pytest.mark.parametrize("num_changes", NUM_CHANGES)
def test_changed_directories(tmp_path: Path, num_changes: int, lists_added_tokens: bool) -> None:
    directory = HostileDirectory.written(tmp_path / "m", lists_added_tokens=lists_added_tokens)
    assert use(directory.path) == "loaded"
    ends = set()
    for seed in range(num_changes):
        name = directory.change(random.Random(seed))
        ends.add((name, use(directory.path, renders=seed % 20 == 0)))
        directory.restore(name)
    assert {end for _, end in ends} == {"ConfigError", "loaded"}
    assert {name for name, end in ends if end == "ConfigError"} >= {*directory.names} - {"chat_template.jinja"}


@pytest.mark.parametrize("lists_added_tokens", [False, True])
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.thorough])])
def test_any_value_under_any_key(tmp_path: Path, lists_added_tokens: bool, step: int) -> None:
    directory = HostileDirectory.written(tmp_path / "m", lists_added_tokens=lists_added_tokens)
    names = [name for name in directory.names if name.endswith(".json") and name != "tokenizer.json"]
    ends = set()
    for name in names:
        value = directory.value_of(name)
        for at, key in enumerate([*value, "never seen"]):
            for other in VALUES[at % step :: step]:
                (directory.path / name).write_text(json.dumps({**value, key: other}))
                ends.add(use(directory.path, renders=False))
        directory.restore(name)
    assert ends == {"ConfigError", "loaded"}


@pytest.mark.parametrize("num_changes", NUM_CHANGES)
def test_changed_gguf_files(tmp_path: Path, num_changes: int) -> None:
    write_gguf(tmp_path / "whole.gguf", SPEC, random_weights(SPEC))
    parts, changed = GgufParts.of(tmp_path / "whole.gguf"), tmp_path / "changed.gguf"
    ends = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of scales that are no numbers any more
        for seed in range(num_changes):
            changed.write_bytes(parts.changed(random.Random(seed)))
            ends.add(use(changed, renders=seed % 20 == 0))
    assert ends == {"ConfigError", "loaded"}


@pytest.mark.parametrize("name", sorted(READERS))
def test_changed_headers(tmp_path: Path, name: str) -> None:
    reader, ends = READERS[name](tmp_path / name), set()
    for seed in range(300):
        reader.change(random.Random(seed))
        ends.add(reader.read())
    assert ends == {"read", "refused"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("max_position_embeddings", 10**9),
        ("max_position_embeddings", 2**70),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", 10**400),
        ("vocab_size", 2**40),
        ("rope_theta", float("nan")),
        ("rope_theta", -1.0),
        ("rope_theta", 0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", -1e-5),
        ("rope_scaling", {"rope_type": "linear", "factor": float("inf")}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
        ("rope_scaling", [1]),
        ("eos_token_id", ["</s>"]),
        ("eos_token_id", -1),
    ],
)
def test_numbers_beyond_any_model_are_refused(field: str, value: Any) -> None:
    config = {**hf_config(tiny_spec()), field: value}
    if field == "rope_scaling" and isinstance(value, dict):
        config[field] = {"original_max_position_embeddings": 64, **value}
    with pytest.raises(ConfigError):
        spec_from_hf_config("m", config)


def write_safetensors(path: Path, header: str) -> None:
    data = header.encode()
    path.mkdir()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(64))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (['"a": [0, 64]', '"b": [32, 64]'], "'a' and 'b' share bytes"),
        (['"a": [0, 64]', '"b": [0, 64]'], "share bytes"),
        (['"a": [0, 32]', '"a": [32, 64]'], "a name appears twice"),
    ],
)
def test_tensors_that_share_bytes_or_names_are_refused(tmp_path: Path, entries: list[str], words: str) -> None:
    header = []
    for entry in entries:
        name, _, offsets = entry.partition(": ")
        begin, end = json.loads(offsets)
        header.append(f'{name}: {{"dtype": "F32", "shape": [{(end - begin) // 4}], "data_offsets": {offsets}}}')
    write_safetensors(tmp_path / "m", "{" + ",".join(header) + "}")
    with pytest.raises(ConfigError, match=words):
        SafetensorsWeights(tmp_path / "m", has_tied_embeddings=False)


def test_an_index_leads_to_no_other_directory(tmp_path: Path) -> None:
    directory = tiny_directory(tmp_path / "m")
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../m/model.safetensors"}}))
    with pytest.raises(ConfigError, match="is no file of this directory"):
        SafetensorsWeights(directory, has_tied_embeddings=False)


def test_a_gguf_file_names_no_tensor_twice(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", SPEC, random_weights(SPEC))
    content = (tmp_path / "m.gguf").read_bytes()
    assert content.count(b"blk.1.attn_q.weight") == 1
    (tmp_path / "m.gguf").write_bytes(content.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))
    with pytest.raises(ConfigError, match="names a tensor twice"):
        GgufFile(tmp_path / "m.gguf")


def test_a_tokenizer_file_on_which_its_package_panics(tmp_path: Path) -> None:
    directory = tiny_directory(tmp_path / "m")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "a much longer prefix than any token"
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert use(directory) == "ConfigError"

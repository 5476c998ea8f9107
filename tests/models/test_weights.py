"""Tensors from safetensors directories: number formats, several files, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tiny_files import hf_name, tiny_directory
from tiny_models import CHANGES_BY_NAME, random_weights, tiny_spec

from blendserve.errors import ConfigError
from blendserve.models.hub import ModelFiles, resolve
from blendserve.models.load import load_model
from blendserve.models.safetensors import SafetensorsWeights
from blendserve.models.weights import MemoryWeights, check_weights, expected_shapes, round_to_bf16

VALUES = np.array([[1.0, -2.5, 3.0e-3], [65504.0, 0.0, -1.0e-4]], dtype=np.float32)


def write_raw(path: Path, entries: dict[str, Any], data: bytes) -> None:
    """A safetensors file by hand: what its own package would not write."""
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("name", CHANGES_BY_NAME)
def test_a_directory_gives_every_tensor_back(name: str, tmp_path: Path) -> None:
    loaded = load_model(resolve(str(tiny_directory(tmp_path / "m", name)), tmp_path))
    weights = random_weights(tiny_spec(name))
    assert set(loaded.weights.shape_by_name) == set(expected_shapes(loaded.spec))
    for tensor in weights.shape_by_name:
        np.testing.assert_array_equal(loaded.weights.tensor(tensor), weights.tensor(tensor))


@pytest.mark.parametrize(("dtype", "stored"), [("F32", "<f4"), ("F16", "<f2"), ("F64", "<f8")])
def test_number_formats(dtype: str, stored: str, tmp_path: Path) -> None:
    data = VALUES.astype(stored)
    write_raw(tmp_path / "model.safetensors", {"x": entry(dtype, 0, data.nbytes)}, data.tobytes())
    tensor = SafetensorsWeights(tmp_path, has_tied_embeddings=False).tensor("x")
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, data.astype(np.float32))


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    rounded = round_to_bf16(VALUES)
    data = (rounded.view(np.uint32) >> 16).astype("<u2")
    write_raw(
        tmp_path / "model.safetensors", {"x": entry("BF16", 0, 12), "__metadata__": {"format": "pt"}}, data.tobytes()
    )
    weights = SafetensorsWeights(tmp_path, has_tied_embeddings=False)
    assert weights.shape_by_name == {"x": (2, 3)}
    np.testing.assert_array_equal(weights.tensor("x"), rounded)


def entry(dtype: str, begin: int, end: int, shape: tuple[int, ...] = (2, 3)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_round_to_bf16_goes_to_the_nearest_and_to_even_on_ties() -> None:
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20], dtype=np.float32)
    np.testing.assert_array_equal(round_to_bf16(ties), np.array([1, 1 + 2**-6, -1, 1 + 2**-7], np.float32))
    special = np.array([np.inf, -np.inf, 0.0, -0.0], np.float32)
    np.testing.assert_array_equal(round_to_bf16(special).view(np.uint32), special.view(np.uint32))
    assert np.isnan(round_to_bf16(np.array([np.nan], np.float32)))[0]


def write_index(directory: Path, **file_by_tensor: str) -> None:
    weight_map = {hf_name(name): f"{file}.safetensors" for name, file in file_by_tensor.items()}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save(path: Path, **tensors: Any) -> None:
    safetensors.numpy.save_file({hf_name(name): tensor for name, tensor in tensors.items()}, path)


def test_the_files_that_an_index_names(tmp_path: Path) -> None:
    save(tmp_path / "model-1.safetensors", norm=VALUES[0])
    save(tmp_path / "model-2.safetensors", embed_tokens=VALUES)
    write_index(tmp_path, norm="model-1", embed_tokens="model-2")
    assert set(SafetensorsWeights(tmp_path, False).shape_by_name) == {"norm", "embed_tokens"}
    write_index(tmp_path, norm="model-1")
    assert set(SafetensorsWeights(tmp_path, False).shape_by_name) == {"norm"}
    write_index(tmp_path, norm="model-1", embed_tokens="model-3")
    with pytest.raises(ConfigError, match=r"lacks model-3\.safetensors"):
        SafetensorsWeights(tmp_path, False)


def test_the_index_says_which_of_two_copies_counts(tmp_path: Path) -> None:
    save(tmp_path / "model-1.safetensors", norm=VALUES[0], embed_tokens=VALUES)
    save(tmp_path / "model-2.safetensors", norm=VALUES[1])
    write_index(tmp_path, norm="model-2", embed_tokens="model-1")
    np.testing.assert_array_equal(SafetensorsWeights(tmp_path, False).tensor("norm"), VALUES[1])


@pytest.mark.parametrize(
    "beside",
    [
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "model-00001-of-00002.safetensors",
        "model.fp16.safetensors",
    ],
)
def test_what_lies_beside_the_weights_is_no_part_of_them(beside: str, tmp_path: Path) -> None:
    directory = tiny_directory(tmp_path / "m")
    expected = load_model(ModelFiles("m", directory)).weights
    safetensors.numpy.save_file({hf_name("norm"): VALUES, "x": VALUES}, directory / beside)
    found = load_model(ModelFiles("m", directory)).weights
    assert found.shape_by_name == expected.shape_by_name
    np.testing.assert_array_equal(found.tensor("norm"), expected.tensor("norm"))


def test_an_old_index_beside_whole_weights(tmp_path: Path) -> None:
    """A model that was saved again in one file: transformers takes the file."""
    directory = tiny_directory(tmp_path / "m")
    write_index(directory, norm="model-00001-of-00002")
    assert set(load_model(ModelFiles("m", directory)).weights.shape_by_name) == set(expected_shapes(tiny_spec()))


def test_rows_that_pad_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    directory = tiny_directory(tmp_path / "m")
    whole = safetensors.numpy.load_file(directory / "model.safetensors")
    expected = whole[hf_name("embed_tokens")]
    for name in ("embed_tokens", "lm_head"):
        whole[hf_name(name)] = np.concatenate([whole[hf_name(name)], np.ones((64, expected.shape[1]), np.float32)])
    safetensors.numpy.save_file(whole, directory / "model.safetensors")
    weights = load_model(ModelFiles("m", directory)).weights
    assert weights.shape_by_name["lm_head"] == expected.shape
    np.testing.assert_array_equal(weights.tensor("embed_tokens"), expected)


@pytest.mark.parametrize(
    ("present", "words"),
    [
        ([], "no model.safetensors and no index of several such files; download the model again"),
        (["consolidated.safetensors"], "it has 'consolidated.safetensors': download model.safetensors"),
        (["pytorch_model.bin"], "it has weights of PyTorch; convert them with transformers"),
    ],
)
def test_directories_without_weights(present: list[str], words: str, tmp_path: Path) -> None:
    for name in present:
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ConfigError, match=words):
        SafetensorsWeights(tmp_path, False)


def test_a_pointer_in_the_place_of_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    with pytest.raises(ConfigError, match="pointer of Git LFS, not the file itself; fetch it: git lfs pull"):
        SafetensorsWeights(tmp_path, False)


def test_old_buffers_and_a_second_copy_of_the_embedding_are_left_out(tmp_path: Path) -> None:
    tensors = {hf_name("lm_head"): VALUES, "model.layers.0.self_attn.rotary_emb.inv_freq": VALUES[0]}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert set(SafetensorsWeights(tmp_path, has_tied_embeddings=True).shape_by_name) == set()
    assert set(SafetensorsWeights(tmp_path, has_tied_embeddings=False).shape_by_name) == {"lm_head"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"x": {}}',
        (2**63).to_bytes(8, "little") + b"{}",
    ],
)
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        SafetensorsWeights(tmp_path, False)


@pytest.mark.parametrize(
    "bad", [entry("F32", 0, 20), entry("F32", 0, 24, (-2, -3)), entry("F32", 4, 28), entry("F32", -4, 20), {"dtype": 1}]
)
def test_entries_that_do_not_fit_their_bytes(bad: dict[str, Any], tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"x": bad}, bytes(24))
    with pytest.raises(ConfigError, match="damaged safetensors header"):
        SafetensorsWeights(tmp_path, False)


def test_a_type_that_we_do_not_read(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"x": entry("I8", 0, 6)}, bytes(6))
    with pytest.raises(ConfigError, match="'x' is 'I8'; supported: F64, F32, F16, BF16"):
        SafetensorsWeights(tmp_path, False)


def test_check_weights_names_what_does_not_fit() -> None:
    spec = tiny_spec()
    tensors = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(spec).items()}
    check_weights(spec, MemoryWeights(tensors))
    tensors["norm"] = np.zeros(7, np.float32)
    tensors["layers.0.o_proj.bias"] = np.zeros(96, np.float32)
    del tensors["lm_head"]
    with pytest.raises(ConfigError) as error:
        check_weights(spec, MemoryWeights(tensors))
    for part in (
        "lm_head is missing, expected [320, 96]",
        "norm is [7], expected [96]",
        "o_proj.bias [96] is unexpected",
    ):
        assert part in str(error.value)


def test_a_name_with_line_breaks_is_told_on_one_line() -> None:
    spec = tiny_spec()
    tensors = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(spec).items()}
    with pytest.raises(ConfigError, match=r"a\\nb\\x1b \[2\] is unexpected") as error:
        check_weights(spec, MemoryWeights({**tensors, "a\nb\x1b": np.zeros(2, np.float32)}))
    assert str(error.value).isprintable()


def test_a_tensor_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no tensor 'nothing'"):
        MemoryWeights({}).tensor("nothing")

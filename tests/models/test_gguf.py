"""GGUF files: every kind of block against the `gguf` package, whole tiny models, and files that are damaged."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hostile_models import gguf_string, gguf_value
from tiny_files import write_gguf
from tiny_models import CHANGES_BY_NAME, random_weights, tiny_spec

from blendserve.errors import ConfigError
from blendserve.models.fingerprint import fingerprint
from blendserve.models.gguf_dequantize import dequantize
from blendserve.models.gguf_file import GgufFile
from blendserve.models.gguf_spec import spec_from_gguf
from blendserve.models.hub import ModelFiles, resolve
from blendserve.models.load import load_model
from blendserve.models.spec import ModelSpec, RopeScaling

FLOATS = ("F32", "F16", "BF16")
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
OTHERS = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
)


@pytest.mark.parametrize("kind", [*FLOATS, *QUANTISED])
@pytest.mark.parametrize("rows", [1, 3, 700])
def test_blocks_are_unpacked_bitwise_as_the_package_does(kind: str, rows: int) -> None:
    """700 rows of 192 are 4200 blocks: more than one chunk, the last one short."""
    values = np.random.default_rng(0).standard_normal((rows, 192)).astype(np.float32)
    quantization = gguf.GGMLQuantizationType[kind]
    stored = gguf.quantize(values, quantization).view(np.uint8).reshape(rows, -1)
    unpacked = dequantize(stored, kind)
    assert unpacked.dtype == np.float32
    assert unpacked.flags.c_contiguous
    np.testing.assert_array_equal(unpacked, gguf.dequantize(stored, quantization).reshape(rows, 192))
    largest = np.abs(values.reshape(-1, 32)).max(axis=1)  # of each block
    steps = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 127, "Q5_0": 1 / 15, "Q5_1": 1 / 15}.get(
        kind, 1 / 7
    )
    error = np.abs(unpacked - values).reshape(-1, 32).max(axis=1)
    assert (error <= steps * largest * 1.001).all()


@pytest.mark.parametrize("kind", [*K_QUANTS, *OTHERS])
def test_other_kinds_go_through_the_package(kind: str, tmp_path: Path) -> None:
    """A file with random blocks, read back: sizes, offset and order of the bytes are right."""
    quantization = gguf.GGMLQuantizationType[kind]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    stored = np.random.default_rng(0).integers(0, 60, (5, 2 * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("before", np.ones(3, np.float32))
    writer.add_tensor("x", stored, raw_dtype=quantization)
    finish(writer)
    file = GgufFile(tmp_path / "m.gguf")
    tensor = file.tensor_by_name["x"]
    assert (tensor.kind, tensor.shape) == (kind, (5, 2 * block_size))
    np.testing.assert_array_equal(file.tensor_bytes(tensor), stored)
    np.testing.assert_array_equal(dequantize(stored, kind), gguf.dequantize(stored, quantization))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", sorted(CHANGES_BY_NAME.keys() - {"longrope"}))  # which GGUF has for Phi 3 only
def test_a_file_gives_spec_and_tensors_back(name: str, tmp_path: Path) -> None:
    """q and k of Llama are stored interleaved, of Qwen not; both come back half-split."""
    spec, weights = tiny_spec(name), random_weights(tiny_spec(name))
    write_gguf(tmp_path / "m.gguf", spec, weights)
    loaded = load_model(resolve(str(tmp_path / "m.gguf"), tmp_path))
    assert loaded.spec == replace(spec, name="m")
    for tensor in weights.shape_by_name:
        np.testing.assert_array_equal(loaded.weights.tensor(tensor), weights.tensor(tensor))


@pytest.mark.parametrize("kind", ["F16", "BF16", *QUANTISED])
def test_quantised_models_stay_close(kind: str, tmp_path: Path) -> None:
    spec, weights = tiny_spec(), random_weights(tiny_spec())
    write_gguf(tmp_path / "m.gguf", spec, weights, kind)
    loaded = load_model(resolve(str(tmp_path), tmp_path))
    for tensor in ("layers.1.q_proj", "layers.2.k_proj", "layers.0.down_proj", "embed_tokens"):
        found, expected = loaded.weights.tensor(tensor), weights.tensor(tensor)
        assert np.abs(found - expected).max() <= np.abs(expected).max() / 7
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98


def written_in_parts(path: Path, spec: ModelSpec) -> list[Path]:
    """The file of a model as `gguf-split` cuts it: metadata first, tensors in the parts after it."""
    write_gguf(path / "whole.gguf", spec, random_weights(spec))
    whole = GgufFile(path / "whole.gguf")
    shared = [
        dict(tensors) for tensors in (list(whole.tensor_by_name.items())[::2], list(whole.tensor_by_name.items())[1::2])
    ]
    paths = []
    for number, tensors in enumerate([{}, *shared]):
        paths.append(path / f"m-{number + 1:05}-of-00003.gguf")
        metadata = {**(whole.metadata if number == 0 else {}), "split.no": number, "split.count": 3}
        fields = b"".join(gguf_string(key) + gguf_value(value) for key, value in metadata.items())
        headers, data = b"", b""
        for name, tensor in tensors.items():
            stored = whole.tensor_bytes(tensor).tobytes()
            shape = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            headers += (
                gguf_string(name) + struct.pack("<I", len(tensor.shape)) + shape + struct.pack("<IQ", 0, len(data))
            )
            data += stored + bytes(-len(stored) % 32)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + fields + headers
        paths[-1].write_bytes(head + bytes(-len(head) % 32) + data)
    (path / "whole.gguf").unlink()
    return paths


def test_a_split_file_is_read_whole(tmp_path: Path) -> None:
    spec = tiny_spec()
    first, second, third = written_in_parts(tmp_path, spec)
    weights = random_weights(spec)
    for given in (first, tmp_path):
        loaded = load_model(resolve(str(given), tmp_path))
        assert loaded.spec.name == "m"
        for tensor in weights.shape_by_name:
            np.testing.assert_array_equal(loaded.weights.tensor(tensor), weights.tensor(tensor))
    before = fingerprint(ModelFiles("m", first))
    content = bytearray(third.read_bytes())
    content[-40] ^= 1
    third.write_bytes(content)
    assert fingerprint(ModelFiles("m", first)) != before
    with pytest.raises(ConfigError, match=r"part 2 of 3; give the first part, .*m-00001-of-00003\.gguf"):
        GgufFile(second)
    second.rename(tmp_path / "other.gguf")
    with pytest.raises(ConfigError, match=r"m-00002-of-00003\.gguf is not beside it"):
        GgufFile(first)
    with pytest.raises(ConfigError, match=r"part 2 of 3; its name must end in -00002-of-00003\.gguf"):
        GgufFile(tmp_path / "other.gguf")
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not part 2 of"):
        GgufFile(first)


def test_a_type_that_nobody_unpacks_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.zeros((2, 292), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    finish(writer)
    with pytest.raises(
        ConfigError, match=r"tensor 'x' has Q8_K \(ggml type 15\), which is not supported; supported: F32"
    ):
        GgufFile(tmp_path / "m.gguf")


def test_double_precision() -> None:
    values = np.array([[1.0, -2.5e-3, 65504.0]])
    np.testing.assert_array_equal(dequantize(values.view(np.uint8), "F64"), values.astype(np.float32))


def test_a_package_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(*_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", too_old)
    with pytest.raises(ConfigError, match="cannot unpack MXFP4 weights; install a newer one"):
        dequantize(np.zeros((1, 17), np.uint8), "MXFP4")


def test_metadata_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_spec(), random_weights(tiny_spec()))
    ours = GgufFile(tmp_path / "m.gguf").metadata
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    for key, value in ours.items():
        assert theirs.fields[key].contents() == value, key
    assert len(ours) == len(theirs.fields) - 3  # it counts the header's three numbers as fields


@pytest.mark.parametrize("original", [64, 4096, 8192])
def test_llama3_rope_is_recovered_from_its_divisors(original: int, tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 32.0, 1.0, 4.0, original)
    spec = tiny_spec("head-64", rope_scaling=scaling, rope_theta=500000.0)
    write_gguf(tmp_path / "m.gguf", spec, random_weights(spec))
    assert spec_from_gguf("m", GgufFile(tmp_path / "m.gguf")).rope_scaling == scaling


def test_other_rotary_factors_are_refused(tmp_path: Path) -> None:
    spec = tiny_spec("head-64", rope_scaling=RopeScaling("llama3", 32.0, 2.0, 4.0, 64), rope_theta=500000.0)
    write_gguf(tmp_path / "m.gguf", spec, random_weights(spec))
    with pytest.raises(ConfigError, match="do not follow the llama3 rule"):
        spec_from_gguf("m", GgufFile(tmp_path / "m.gguf"))


def with_metadata(tmp_path: Path, changes: dict[str, Any]) -> GgufFile:
    write_gguf(tmp_path / "m.gguf", tiny_spec(), random_weights(tiny_spec()))
    file = GgufFile(tmp_path / "m.gguf")
    for key, value in changes.items():
        if value is None:
            del file.metadata[key]
        else:
            file.metadata[key] = value
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma2"}, "'gemma2' is not supported; known architectures: llama"),
        ({"llama.expert_count": 8}, "'llama.expert_count' is 8"),
        ({"llama.rope.dimension_count": 8}, "'llama.rope.dimension_count' is 8"),
        ({"llama.attention.value_length": 8}, "'llama.attention.value_length' is 8"),
        ({"llama.attention.sliding_window": "x"}, "'llama.attention.sliding_window' is 'x'"),
        ({"llama.attn_logit_softcapping": 50.0}, "'llama.attn_logit_softcapping' is 50.0.* would change the model"),
        ({"llama.logit_scale": 0.5}, "'llama.logit_scale' is 0.5"),
        ({"llama.attention.sliding_window_pattern": 4}, "sliding_window_pattern' is 4"),
        ({"llama.rope.scaling.yarn_beta_fast": 16.0}, "yarn_beta_fast' is 16.0"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, "rotary scaling 'longrope' by 4.0"),
        ({"llama.block_count": None}, "lacks 'llama.block_count'"),
        ({"llama.attention.head_count_kv": [2, 3, 2]}, r"head_count_kv' is \[2, 3, 2\]; one integer"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_from_gguf("m", with_metadata(tmp_path, changes))


def test_a_window_limits_the_context(tmp_path: Path) -> None:
    spec = spec_from_gguf("m", with_metadata(tmp_path, {"llama.attention.sliding_window": 100}))
    assert (spec.max_position, "the last 100 only" in spec.context_limit) == (100, True)


def test_defaults_of_the_metadata(tmp_path: Path) -> None:
    optional = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base")
    changes: dict[str, Any] = {f"llama.{key}": None for key in optional}
    changes["llama.attention.head_count_kv"] = [2, 2, 2]
    changes |= {"llama.rope.scaling.type": "none"}
    assert spec_from_gguf("tiny-llama", with_metadata(tmp_path, changes)) == tiny_spec()


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 30, 100, 3000])
def test_a_file_cut_short_anywhere_in_its_header(kept: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_spec(), random_weights(tiny_spec()))
    path = tmp_path / "cut.gguf"
    path.write_bytes((tmp_path / "m.gguf").read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"cut\.gguf"):
        GgufFile(path)


def test_a_file_cut_short_in_its_tensors(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_spec(), random_weights(tiny_spec()))
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:-4])
    with pytest.raises(ConfigError, match=r"cut short: tensor"):
        GgufFile(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(60), "version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(60), "version 50331648"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16 + bytes(60), "damaged"),
        (b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + b"\x01" + bytes(7) + b"\xff" * 60, "damaged"),
    ],
)
def test_files_that_are_something_else(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        GgufFile(tmp_path / "m.gguf")


def test_an_alignment_of_nothing(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("general.alignment", 0)
    writer.add_tensor("x", np.ones(3, np.float32))
    finish(writer)
    with pytest.raises(ConfigError, match=r"m\.gguf: general.alignment is 0; it must be from 1 up"):
        GgufFile(tmp_path / "m.gguf")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        GgufFile(tmp_path / "none.gguf")

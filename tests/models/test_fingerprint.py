"""Files that give other answers get another name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_files import tiny_directory

from blendserve.errors import ConfigError
from blendserve.models.fingerprint import fingerprint
from blendserve.models.hub import ModelFiles

SIZE = 3 << 20


def gguf(path: Path, *changed: tuple[int, int]) -> ModelFiles:
    """A file whose bytes in [begin, end) differ from those of the unchanged one."""
    content = bytearray(SIZE)
    for begin, end in changed:
        content[begin:end] = b"\1" * (end - begin)
    path.write_bytes(content)
    return ModelFiles("m", path)


@pytest.mark.parametrize("begin", [0, 1 << 19, 3 << 19, SIZE - 20_000])
def test_a_change_anywhere_gives_another_name(begin: int, tmp_path: Path) -> None:
    before = fingerprint(gguf(tmp_path / "a.gguf"))
    assert fingerprint(gguf(tmp_path / "b.gguf")) == before, "the name of the file does not count"
    assert fingerprint(gguf(tmp_path / "a.gguf", (begin, begin + 16_384))) != before


def test_short_files_are_read_whole(tmp_path: Path) -> None:
    names = set()
    for content in (b"", b"a", b"b", b"ab"):
        (tmp_path / "m.gguf").write_bytes(content)
        names.add(fingerprint(ModelFiles("m", tmp_path / "m.gguf")))
    assert len(names) == 4


def test_a_directory_counts_its_configuration_and_template(tmp_path: Path) -> None:
    directory = tiny_directory(tmp_path / "model")
    files = ModelFiles("m", directory)
    before = fingerprint(files)
    (directory / "README.md").write_text("no part of the model")
    assert fingerprint(files) == before
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint(files) != before


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.pt", "consolidated.pth"])
def test_weights_of_every_format_count(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    names = set()
    for content in (b"some weights", b"same weights"):
        (tmp_path / name).write_bytes(content)
        names.add(fingerprint(ModelFiles("m", tmp_path)))
    assert len(names) == 2


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.gguf"):
        fingerprint(ModelFiles("m", tmp_path / "missing.gguf"))

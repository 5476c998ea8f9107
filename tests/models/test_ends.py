"""Which tokens end an answer: whatever a file of the model names, in directories and in GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from tiny_files import tiny_directory, write_gguf
from tiny_models import random_weights, tiny_spec

from blendserve.errors import ConfigError
from blendserve.models.ends import ends_by_name, united
from blendserve.models.gguf_file import GgufFile
from blendserve.models.gguf_tokenizer import tokenizer_from_gguf
from blendserve.models.hub import ModelFiles
from blendserve.models.load import load_model

NAMES = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>")


def set_json(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({name: item for name, item in {**value, **changes}.items() if item is not None}))


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (2, 2, "<s>", {1, 2}),
        (2, None, "<s>", {1, 2}),
        ([0, 2], [1], "</s>", {0, 1, 2}),
        (None, [1], None, {1}),
        (1, None, None, {1}),
        (None, None, "</s>", {2}),
        (None, None, None, set()),
        (2, [999_999], None, {2}),  # an id that the model does not have ends nothing
    ],
)
def test_a_directory_unites_its_three_sources(
    config: object, generation: object, tokenizer: object, expected: set[int], tmp_path: Path
) -> None:
    directory = tiny_directory(tmp_path / "m")
    set_json(directory / "config.json", eos_token_id=config)
    set_json(directory / "generation_config.json", eos_token_id=generation)
    set_json(directory / "tokenizer_config.json", eos_token=tokenizer)
    ends = load_model(ModelFiles("m", directory)).spec.eos_token_ids
    assert set(ends) == expected
    assert len(ends) == len(expected)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_id_is_named_with_its_file(name: str, tmp_path: Path) -> None:
    directory = tiny_directory(tmp_path / "m")
    set_json(directory / name, eos_token_id="257")
    with pytest.raises(ConfigError, match=f"eos_token_id is '257' in .*{name}; it must be a token id"):
        load_model(ModelFiles("m", directory))


def gguf_with_tokens(path: Path, names: tuple[str, ...], kind: int) -> GgufFile:
    """A file with these tokens more, of one type of token."""
    spec = tiny_spec()
    write_gguf(path, spec, random_weights(spec))
    file = GgufFile(path)
    tokens, types = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
    tokens += names
    types += [kind] * len(names)
    return file


@pytest.mark.parametrize("kind", [gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.NORMAL])
def test_a_gguf_file_has_ends_by_name(kind: int, tmp_path: Path) -> None:
    file = gguf_with_tokens(tmp_path / "m.gguf", NAMES, int(kind))
    tokenizer = tokenizer_from_gguf(file)
    last = tiny_spec().vocab_size
    assert set(tokenizer.eos_token_ids) == {2, *range(last, last + len(NAMES))}
    assert tokenizer.encode("the<|im_end|>")[-1] in tokenizer.special_token_ids  # whole, whatever the file calls it


def test_a_message_of_harmony_ends_no_answer() -> None:
    assert ends_by_name(["a", "<|end|>", "<|return|>", "<|call|>"]) == (2, 3)
    assert ends_by_name(["a", "<|end|>", "<|return|>"]) == (1, 2)


def test_united_keeps_the_order_of_the_sources() -> None:
    assert united((3, 1), (), (1, 2)) == (3, 1, 2)

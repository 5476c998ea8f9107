"""Tokenizers from directories and GGUF metadata: round trips, special tokens, bytes of tokens, settings beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_files import byte_level_tokenizer, tiny_directory, write_gguf
from tiny_models import random_weights, tiny_spec
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend

from blendserve.errors import ConfigError, RequestError
from blendserve.models.gguf_file import GgufFile
from blendserve.models.gguf_tokenizer import tokenizer_from_gguf
from blendserve.models.hub import ModelFiles, resolve
from blendserve.models.load import load_model, load_tokenizer
from blendserve.models.tokenizer import Tokenizer
from blendserve.models.tokenizer_directory import tokenizer_from_directory

TEXTS = (
    "the capital of france",
    "Grüße, 東京! 🚂\n\t  x",
    "",
    "  two  spaces  ",
    "<s>user</s>",
    "1234 12 3.5",
    "\x00\x7f",
)
SCORED = ("<unk>", "<s>", "</s>", "▁", "t", "h", "e", "▁t", "he", "▁the", "a", "b", "ab", "▁a")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("tokenizer") / "m")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return tokenizer_from_directory(directory)


@pytest.fixture(scope="module")
def gguf_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, tiny_spec(), random_weights(tiny_spec()))
    return load_tokenizer(ModelFiles("m", path))


def test_the_two_kinds_of_file_agree(tokenizer: Tokenizer, gguf_tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        np.testing.assert_array_equal(tokenizer.encode(text), gguf_tokenizer.encode(text))
    assert gguf_tokenizer.eos_token_ids == tokenizer.eos_token_ids == (2,)
    assert gguf_tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert gguf_tokenizer.chat_template_source == tokenizer.chat_template_source


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    if not any(token in text for token in ("<unk>", "<s>", "</s>")):
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(token) for token in ids.tolist()) == text.encode()


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    for batch, text in zip(tokenizer.encode_batch(TEXTS), TEXTS, strict=True):
        np.testing.assert_array_equal(batch, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode_batch(["a\ud800b", "plain"])
    assert tokenizer.decode(first) == "a\ufffdb"
    assert tokenizer.decode(second) == "plain"


def test_special_tokens_are_matched_whole_and_left_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<s>b</s>")
    assert ids[[1, 3]].tolist() == [1, 2]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<s>b</s>"
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert tokenizer.token_bytes(1) == b"<s>"


def test_half_a_character_decodes_to_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🚂")
    assert tokenizer.decode(ids[:-1]).startswith("\ufffd")
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.decode([10**6]) == ""


def test_truncation_and_padding_of_the_file_are_switched_off(directory: Path, tmp_path: Path) -> None:
    backend = byte_level_tokenizer(320)
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    expected = tokenizer_from_directory(directory).encode("the capital of france")
    np.testing.assert_array_equal(tokenizer_from_directory(tmp_path).encode("the capital of france"), expected)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 0]}, {"eos_token": "</s>"}, (2, 0)),
        ({"eos_token_id": 1.0}, {"eos_token": "</s>"}, (1, 2)),
        ({}, {"eos_token": {"content": "</s>", "special": True}}, (2,)),
        ({}, {"eos_token": None}, ()),
        ({}, {"eos_token": "<nowhere>"}, (320,)),  # it is added, as transformers does
    ],
)
def test_end_tokens(generation: Any, config: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    byte_level_tokenizer(320).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer_from_directory(tmp_path).eos_token_ids == expected


def test_the_model_gets_the_tokenizers_end_tokens(directory: Path, tmp_path: Path) -> None:
    assert load_model(resolve(str(directory), tmp_path)).spec.eos_token_ids == (2,)


def test_where_chat_templates_are_found(tmp_path: Path) -> None:
    byte_level_tokenizer(320).save(str(tmp_path / "tokenizer.json"))
    assert not tokenizer_from_directory(tmp_path).has_chat_template
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizer_from_directory(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "from a list"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert tokenizer_from_directory(tmp_path).apply_chat_template([]) == "from a list"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert tokenizer_from_directory(tmp_path).apply_chat_template([]) == "from a file"


def test_chat(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "what is it?"}]
    assert tokenizer.apply_chat_template(messages) == "<s>user: what is it?\nassistant: "
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == "<s>user: what is it?\n"
    assert tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)[0] == 1


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json; download the model again"):
        tokenizer_from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cannot read .*tokenizer\.json"):
        tokenizer_from_directory(tmp_path)
    byte_level_tokenizer(320).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json holds a list"):
        tokenizer_from_directory(tmp_path)


def test_a_token_beyond_the_embedding_is_an_error_of_its_text(tmp_path: Path) -> None:
    backend = Backend.from_file(str(tiny_directory(tmp_path / "m") / "tokenizer.json"))
    backend.add_tokens([f"<extra{index}>" for index in range(400)])
    backend.save(str(tmp_path / "m" / "tokenizer.json"))
    tokenizer = load_model(resolve(str(tmp_path / "m"), tmp_path)).tokenizer
    beyond, plain = tokenizer.encode_each(["the <extra399>", "the"])
    assert isinstance(beyond, RequestError)
    assert "holds the token '<extra399>'" in beyond.message
    assert not isinstance(plain, RequestError)


def gguf_with(tmp_path: Path, **changes: Any) -> GgufFile:
    write_gguf(tmp_path / "m.gguf", tiny_spec(), random_weights(tiny_spec()))
    file = GgufFile(tmp_path / "m.gguf")
    file.metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return file


def sentencepiece(tmp_path: Path, **changes: Any) -> Tokenizer:
    """A SentencePiece vocabulary: special tokens, 256 bytes, then pieces with scores; `▁the` before `▁t` + `he`."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*SCORED[:3], *byte_tokens, *SCORED[3:]]
    types = [2, 3, 3, *[6] * 256, *[1] * len(SCORED[3:])]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(SCORED[3:]))]
    settings = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, "merges": None}
    return tokenizer_from_gguf(
        gguf_with(tmp_path, **{**settings, "unknown_token_id": 0, "add_bos_token": True, **changes})
    )


def test_sentencepiece_merges_follow_the_scores(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    pieces = [tokenizer.backend.id_to_token(int(token)) for token in tokenizer.encode("the ab")]
    assert pieces == ["<s>", "▁the", "▁", "ab"]  # ab is ranked above ▁a
    assert tokenizer.decode(tokenizer.encode("the ab")) == "the ab"


def test_sentencepiece_ranks_by_score_not_by_id(tmp_path: Path) -> None:
    scores = [0.0] * 259 + [float(rank) for rank in range(len(SCORED[3:]))]
    tokenizer = sentencepiece(tmp_path, scores=scores)
    assert tokenizer.backend.encode("ab", add_special_tokens=False).tokens == ["▁a", "b"]


def test_sentencepiece_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    ids = tokenizer.encode("é 🚂")
    assert [tokenizer.backend.id_to_token(int(token)) for token in ids[2:4]] == ["<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "é 🚂"
    assert b"".join(tokenizer.token_bytes(int(token)) for token in ids[1:]) == " é 🚂".encode()


def test_sentencepiece_without_a_space_before_the_text(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, add_space_prefix=False)
    assert tokenizer.backend.encode("he the", add_special_tokens=False).tokens == ["he", "▁the"]
    assert tokenizer.decode(tokenizer.encode(" he")) == " he"


def test_bos_and_eos_where_the_file_asks_for_them(tmp_path: Path) -> None:
    plain = tokenizer_from_gguf(gguf_with(tmp_path)).encode("the")
    both = tokenizer_from_gguf(gguf_with(tmp_path, add_bos_token=True, add_eos_token=True))
    assert both.encode("the").tolist() == [1, *plain.tolist(), 2]
    assert both.encode("the", add_special_tokens=False).tolist() == plain.tolist()


def test_turn_ends_of_the_file_are_end_tokens(tmp_path: Path) -> None:
    assert tokenizer_from_gguf(gguf_with(tmp_path, eot_token_id=1, eom_token_id=2)).eos_token_ids == (2, 1)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["don", "'t", "Ġ", "1", "2", "3", "4", "ĠX", "ĊĊĠ", "Ġy"]),
        ("gpt-2", ["don", "'t", "Ġ1234", "ĠX", "ĊĊĠ", "Ġy"]),
        ("qwen2", ["don", "'t", "Ġ", "1", "2", "3", "4", "ĠX", "ĊĊ", "Ġ", "Ġy"]),
        ("llama-bpe", ["don", "'t", "Ġ", "123", "4", "ĠX", "ĊĊ", "Ġ", "Ġy"]),
    ],
)
def test_pieces_of_every_pre_tokenizer(pre: str, pieces: list[str], tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(gguf_with(tmp_path, pre=pre))
    assert tokenizer.backend.pre_tokenizer is not None
    found = tokenizer.backend.pre_tokenizer.pre_tokenize_str("don't 1234 X\n\n  y")
    assert [piece for piece, _ in found] == pieces


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "'bert' is not supported"),
        ({"pre": "viking"}, "'viking' is not known"),
        ({"tokens": []}, "gpt2"),
        ({"token_type": [1, 1]}, "token_type has 2 entries for 320 tokens"),
        ({"model": "llama", "scores": [0.0]}, "scores has 1 entries for 320 tokens"),
        ({"bos_token_id": 320}, "bos_token_id is 320, and there are 320 tokens"),
        ({"eos_token_id": 999, "add_eos_token": True}, "eos_token_id is 999"),
    ],
)
def test_tokenizers_that_we_cannot_rebuild(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenizer_from_gguf(gguf_with(tmp_path, **changes))


@pytest.fixture
def fragile() -> Tokenizer:
    """Its pre-tokenizer gives up on many x in a row, by a panic."""
    backend = byte_level_tokenizer(320)
    split = pre_tokenizers.Split(Regex("(x+x+)+y"), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return Tokenizer(backend)


def test_a_text_that_the_tokenizer_fails_on_fails_alone(fragile: Tokenizer) -> None:
    texts = ["the", "x" * 60, "capital", "", "x" * 70]
    found = fragile.encode_each(texts)
    assert [isinstance(outcome, RequestError) for outcome in found] == [False, True, False, False, True]
    assert "cannot encode this text" in str(found[1])
    for text, outcome in zip(texts, found, strict=True):
        assert isinstance(outcome, RequestError) or np.array_equal(outcome, fragile.encode(text))


def test_a_text_far_beyond_the_context_is_refused_before_it_is_encoded(fragile: Tokenizer) -> None:
    longest = max(map(len, fragile.backend.get_vocab()))
    fits, long = "a" * (8 * longest), "x" * (8 * longest + 1)
    found = fragile.encode_each([fits, long, long], max_tokens=8)
    assert np.array_equal(np.asarray(found[0]), fragile.encode(fits))
    for outcome in found[1:]:
        assert isinstance(outcome, RequestError)
        assert outcome.code == "context_length_exceeded"  # and not what the tokenizer would have said
    assert isinstance(fragile.encode_each([long])[0], RequestError)


def test_an_interrupt_while_encoding_is_no_fault_of_a_text() -> None:
    class Interrupted:
        def encode_batch_fast(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        def no_truncation(self) -> None: ...
        def no_padding(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        Tokenizer(Interrupted()).encode_each(["a", "b"])  # type: ignore[arg-type]

"""Tokenizers of model directories: what the files beside tokenizer.json add, as transformers loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from blendserve.errors import ConfigError
from blendserve.models.tokenizer_directory import tokenizer_from_directory

TEXTS = ("hi there<s>x</s> <|im_start|>user\n<|im_end|>ab <think> y", "  ab ", "[PAD]a[IMG]<tool>b")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
IM = {"258": {"content": "<|im_start|>", "special": True}, "259": {"content": "<|im_end|>", "special": True}}
DECODER = {"256": {"content": "<s>", "special": True}, "257": {"content": "</s>", "special": True}, **IM}
FLAGGED = {"content": "<tool>", "special": False, "lstrip": True, "rstrip": True, "normalized": False}


def directory(path: Path, *, has_bos: bool = False, **files: Any) -> Path:
    """tokenizer.json with bytes, `ab`, `<s>` and `</s>`, and the other files by their stems."""
    vocab = {char: at for at, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:255])} | {"ab": 255}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")])
    if has_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    for stem, content in {"tokenizer_config": SPECIAL, **files}.items():
        (path / f"{stem}.json").write_text(json.dumps(content))
    return path


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing named": {"tokenizer_config": {}},
    "special map": {"tokenizer_config": {}, "special_tokens_map": SPECIAL},
    "special map with objects": {
        "tokenizer_config": {},
        "special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "lstrip": False}},
    },
    "special map over config": {"special_tokens_map": {"eos_token": "<|im_end|>"}},
    "extra in the map": {"special_tokens_map": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
    "added in config": {"tokenizer_config": {**SPECIAL, "added_tokens_decoder": DECODER}},
    "added in config, and a map that does not count": {
        "tokenizer_config": {**SPECIAL, "added_tokens_decoder": DECODER},
        "special_tokens_map": {"eos_token": "<|im_end|>"},
        "added_tokens": {"<think>": 260},
    },
    "an empty list": {"tokenizer_config": {**SPECIAL, "added_tokens_decoder": {}}, "added_tokens": {"<think>": 258}},
    "out of order": {
        "tokenizer_config": {**SPECIAL, "added_tokens_decoder": dict(reversed([*DECODER.items(), ("260", FLAGGED)]))}
    },
    "other flags": {
        "tokenizer_config": {**SPECIAL, "added_tokens_decoder": {"258": FLAGGED, "257": {"content": "</s>"}}}
    },
    "added tokens": {"added_tokens": {"<think>": 259, "<|im_start|>": 258}},
    "added tokens, some special": {
        "tokenizer_config": {**SPECIAL, "pad_token": "[PAD]", "additional_special_tokens": ["<|im_end|>"]},
        "added_tokens": {"[PAD]": 258, "<|im_end|>": 259, "<tool>": 260},
    },
    "named and not there": {"tokenizer_config": {**SPECIAL, "pad_token": "[PAD]", "mask_token": "<think>"}},
    "a name of its own": {"tokenizer_config": {**SPECIAL, "image_token": "[IMG]"}},
    "extra as an object": {"tokenizer_config": {**SPECIAL, "extra_special_tokens": {"image_token": "[IMG]"}}},
    "extra as a list": {"tokenizer_config": {**SPECIAL, "extra_special_tokens": ["[IMG]", "<tool>"]}},
    "a word of the vocabulary": {"tokenizer_config": {**SPECIAL, "eos_token": "ab"}},
    "typed": {"tokenizer_config": {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True}}},
    "bos of the file": {"has_bos": True},
    "the file wins over add_bos_token": {"has_bos": True, "tokenizer_config": {**SPECIAL, "add_bos_token": False}},
    "the file wins again": {
        "tokenizer_config": {**SPECIAL, "add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}
    },
}


@pytest.mark.peer
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    files = {**CASES[name]}
    has_bos = files.pop("has_bos", False)
    path = directory(tmp_path / "m", has_bos=has_bos, **files)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(str(path))
    ours = tokenizer_from_directory(path)
    for text in TEXTS:
        assert ours.encode(text).tolist() == theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).tolist() == theirs.encode(text, add_special_tokens=False)
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    named = {key: value for key, value in theirs.special_tokens_map.items() if key.endswith("_token")}
    assert named.items() <= ours.special_tokens.items()
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


def test_special_tokens_reach_the_template(tmp_path: Path) -> None:
    path = directory(tmp_path / "m", tokenizer_config={"image_token": "[IMG]"}, special_tokens_map=SPECIAL)
    assert tokenizer_from_directory(path).special_tokens == {**SPECIAL, "image_token": "[IMG]"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, r"added_tokens_decoder is \[1\] in .*config.json"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "gives a token the id 'x'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {"content": 3}}}}, "lists the token {'content': 3}"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {"content": "a", "special": 2}}}}, "lists the token"),
        ({"added_tokens": {"<think>": "many"}}, r"added_tokens\.json gives a token the id 'many'"),
        ({"added_tokens": [1]}, r"added_tokens\.json holds a list"),
        ({"special_tokens_map": "x"}, r"special_tokens_map\.json holds a str"),
        ({"tokenizer_config": {"chat_template": [{"name": "rag", "template": "x"}]}}, "none is named default"),
        ({"tokenizer_config": {"chat_template": {"default": 3}}}, "chat template in .* is 3"),
    ],
)
def test_files_of_the_wrong_kind(files: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        tokenizer_from_directory(directory(tmp_path / "m", **files))


def test_chat_templates_by_name(tmp_path: Path) -> None:
    template = {"default": "D", "tool_use": "T"}
    path = directory(tmp_path / "m", tokenizer_config={"chat_template": template})
    assert tokenizer_from_directory(path).chat_template_source == "D"


def test_a_template_that_is_no_utf_8(tmp_path: Path) -> None:
    path = directory(tmp_path / "m")
    (path / "chat_template.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is not UTF-8 text"):
        tokenizer_from_directory(path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (
            "tokenizer.model",
            "tokenizer.model, but no tokenizer.json; write one: pip install transformers sentencepiece",
        ),
        ("vocab.json", "vocab.json, but no tokenizer.json; write one: pip install transformers, then python -c"),
        ("tekken.json", "tekken.json, but no tokenizer.json; download the model again, or another copy of it"),
        ("others.txt", "no tokenizer.json; download the model again, or another copy of it"),
    ],
)
def test_other_kinds_of_tokenizer_files(name: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\n\x0e")
    with pytest.raises(ConfigError, match=f"has {remedy}"):
        tokenizer_from_directory(tmp_path)

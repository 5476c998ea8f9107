"""A tokenizer from a model directory, as transformers loads it: tokenizer.json, and the files that name more tokens.

Where tokenizer_config.json lists `added_tokens_decoder`, that list counts; special_tokens_map.json and
added_tokens.json count only where it does not. `add_bos_token` and `add_eos_token` count only where tokenizer.json is
missing: it says itself what goes around a prompt. Source: transformers 5, tokenization_utils_base.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from blendserve.errors import ConfigError
from blendserve.models.ends import united
from blendserve.models.package_errors import told_as
from blendserve.models.spec import brief, token_ids
from blendserve.models.template_files import template_sources
from blendserve.models.tokenizer import Tokenizer, read_json

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_LISTS = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MAX_ADDED_TOKENS = 1 << 20
_PACKAGES_BY_KIND = {
    "tokenizer.model": "transformers sentencepiece protobuf",
    "vocab.json": "transformers",
    "tekken.json": None,
}
"""Other files that hold a tokenizer, with the packages that write a tokenizer.json of them."""


def tokenizer_from_directory(directory: Path) -> Tokenizer:
    """Read tokenizer.json and what lies beside it: named tokens, chat template, ends of generation_config.json.

    Raises: ConfigError when tokenizer.json is missing or a file cannot be read.
    """
    backend = _backend(directory)
    config = read_json(directory / "tokenizer_config.json")
    added = _added_tokens(directory, config)
    special_tokens = _special_tokens(config)
    with told_as(f"cannot add the tokens that {directory} lists to its tokenizer"):
        _add_tokens(backend, added, special_tokens, config)
    path = directory / "generation_config.json"
    generation_ids = token_ids(read_json(path).get("eos_token_id"), str(path))
    own_id = backend.token_to_id(special_tokens.get("eos_token", ""))
    ends = united(generation_ids, () if own_id is None else (own_id,))
    sources = template_sources(directory, config)
    return Tokenizer(backend, ends, special_tokens, sources.default, tool_template_source=sources.tools)


def _backend(directory: Path) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        kind = next((name for name in _PACKAGES_BY_KIND if (directory / name).is_file()), None)
        found = f"{kind}, but no tokenizer.json" if kind else "no tokenizer.json"
        raise ConfigError(f"{directory} has {found}; {_remedy(directory, kind)}")
    with told_as(f"cannot read {path}"):
        return tokenizers.Tokenizer.from_file(str(path))


def _remedy(directory: Path, kind: str | None) -> str:
    packages = None if kind is None else _PACKAGES_BY_KIND[kind]
    if packages is None:
        return "download the model again, or another copy of it that has one"
    return (
        f'write one: pip install {packages}, then python -c "from transformers import AutoTokenizer; '
        f'AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"'
    )


def _added_tokens(directory: Path, config: dict[str, Any]) -> list[tokenizers.AddedToken]:
    """The tokens that tokenizer.json may lack, in the order of their ids. Mutates: `config`, which gets what
    special_tokens_map.json says where that counts.
    """
    path = directory / "tokenizer_config.json"
    if "added_tokens_decoder" in config:
        listed = config["added_tokens_decoder"]
        if not isinstance(listed, Mapping):
            raise ConfigError(f"added_tokens_decoder is {brief(listed)} in {path}; it must be an object")
        entries = {_token_id(path, key): _added_token(path, value) for key, value in listed.items()}
        return [entries[token_id] for token_id in sorted(entries)]
    config |= read_json(directory / "special_tokens_map.json")
    path = directory / "added_tokens.json"
    special = {*_special_tokens(config).values(), *(token.content for token in _extra_tokens(config))}
    found = {}
    for content, token_id in read_json(path).items():
        flags = {"special": True, "normalized": False} if content in special else {}
        found[_token_id(path, token_id)] = tokenizers.AddedToken(content, **flags)
    return [found[token_id] for token_id in sorted(found)]


def _token_id(path: Path, value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ConfigError(f"{path} gives a token the id {brief(value)}; it must be a whole number from 0 up")
    return value


def _added_token(path: Path, value: Any) -> tokenizers.AddedToken:
    content = _token_text(value)
    flags = {name: value[name] for name in _FLAGS if isinstance(value, Mapping) and name in value}
    if content is None or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ConfigError(f"{path} lists the token {brief(value)}; it must be an object with a text as its content")
    return tokenizers.AddedToken(content, **flags)


def _add_tokens(
    backend: tokenizers.Tokenizer,
    added: list[tokenizers.AddedToken],
    special_tokens: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Add what is not there yet: listed tokens, then named special tokens, then others. Mutates: `backend`."""
    present = backend.get_added_tokens_decoder()
    same = {repr(token) for token in present.values()}
    known = {token.content for token in present.values()}
    named = frozenset(special_tokens.values())
    new = [token for token in added if repr(token) not in same]
    known |= {token.content for token in new}
    for token in (*map(_special_token, special_tokens.values()), *_extra_tokens(config)):
        if token.content not in known:
            new.append(token)
            known.add(token.content)
    for token in new:
        token.special = token.special or token.content in named
    if len(new) > _MAX_ADDED_TOKENS:
        raise ConfigError(f"the tokenizer is to get {len(new)} more tokens; at most {_MAX_ADDED_TOKENS}")
    if new:
        backend.add_tokens(new)


def _special_token(content: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(content, special=True)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by the names that chat templates use."""
    extra = config.get("extra_special_tokens")
    values = {**config, **extra} if isinstance(extra, Mapping) else config
    names = [*_SPECIAL_NAMES, *(name for name in values if name.endswith("_token") and name not in _SPECIAL_NAMES)]
    return {name: text for name in names if (text := _token_text(values.get(name)))}


def _extra_tokens(config: Mapping[str, Any]) -> Iterator[tokenizers.AddedToken]:
    for name in _EXTRA_LISTS:
        listed = config.get(name)
        values = listed.values() if isinstance(listed, Mapping) else listed if isinstance(listed, list) else ()
        yield from (_special_token(text) for value in values if (text := _token_text(value)))


def _token_text(token: Any) -> str | None:
    """A special token of tokenizer_config.json, which is a text or an object around it."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None

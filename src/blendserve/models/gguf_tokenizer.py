"""A tokenizer from the metadata of a GGUF file: its vocabulary with the pre-tokenizer that llama.cpp's name stands for.

Two kinds: byte-level BPE (`gpt2`) and SentencePiece BPE with byte fallback (`llama`), whose merges are recovered from
the scores of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from blendserve.errors import ConfigError
from blendserve.models.ends import END_NAMES, ends_by_name, united
from blendserve.models.gguf_file import GgufFile
from blendserve.models.package_errors import told_as
from blendserve.models.spec import brief
from blendserve.models.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_BY_PRE = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _LLAMA3_SPLIT),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2_SPLIT),
    "tekken": _TEKKEN_SPLIT,
}
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r")
_GPT2 = ("gpt-2", "gpt2")
_WHOLE_WORDS_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
"""A word that is in the vocabulary is one token, even where no chain of merges leads to it."""
_ADDS_BOS = ("llama3", "llama-v3", "llama-bpe", "tekken")
"""Where llama.cpp puts BOS first unless the file says otherwise; it also does for every SentencePiece vocabulary."""


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """Raises: ConfigError when the vocabulary is missing or of a kind that we cannot rebuild exactly."""
    metadata = file.metadata
    _check_types(file)
    kind, vocabulary = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not vocabulary or kind not in ("gpt2", "llama"):
        raise ConfigError(
            f"{file.path}: GGUF tokenizer {brief(kind)} is not supported (known: gpt2, llama); use the model's "
            "safetensors directory, which has a tokenizer.json"
        )
    _check_consistent(file, len(vocabulary))
    is_byte_level = kind == "gpt2"
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    adds_bos = not is_byte_level or pre in _ADDS_BOS
    with told_as(f"{file.path} has a damaged vocabulary"):
        backend = _byte_level(file, pre, vocabulary) if is_byte_level else _sentencepiece(metadata, vocabulary)
        _add_tokens(backend, vocabulary, metadata.get("tokenizer.ggml.token_type") or ())
        _add_post_processor(backend, metadata, vocabulary, is_byte_level, adds_bos=adds_bos)
    end_keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = [metadata[f"tokenizer.ggml.{key}"] for key in end_keys if f"tokenizer.ggml.{key}" in metadata]
    ends = united(named, ends_by_name(vocabulary))
    id_by_name = {
        name: metadata.get(f"tokenizer.ggml.{key}")
        for name, key in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        )
    }
    special_tokens = {
        name: vocabulary[token_id]
        for name, token_id in id_by_name.items()
        if token_id is not None and token_id < len(vocabulary)
    }
    template, of_tools = (metadata.get(f"tokenizer.chat_template{end}") for end in ("", ".tool_use"))
    return Tokenizer(backend, ends, special_tokens, template, tool_template_source=of_tools)


_TYPE_BY_KEY: Mapping[str, type | UnionType] = {
    **dict.fromkeys(("tokens", "merges", "token_type", "scores"), list),
    **dict.fromkeys((f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding")), int),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix"), bool | int),
    **dict.fromkeys(("model", "pre"), str),
}
_ITEM_BY_KEY: Mapping[str, type | UnionType] = {"tokens": str, "merges": str, "token_type": int, "scores": float | int}


def _check_types(file: GgufFile) -> None:
    """Raises: ConfigError when a value of the tokenizer is of another type than its key says."""
    for name, kind in _TYPE_BY_KEY.items():
        value = file.metadata.get(f"tokenizer.ggml.{name}")
        is_right = value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool)))
        if is_right and isinstance(value, list):
            is_right = all(isinstance(item, _ITEM_BY_KEY[name]) for item in value)
        if not is_right:
            raise ConfigError(f"{file.path} is damaged: tokenizer.ggml.{name} is {brief(value)}; download it again")
    for name in ("tokenizer.chat_template", "tokenizer.chat_template.tool_use"):
        template = file.metadata.get(name)
        if template is not None and not isinstance(template, str):
            raise ConfigError(f"{file.path} is damaged: {name} is {brief(template)}; download it again")


def _check_consistent(file: GgufFile, num_tokens: int) -> None:
    """Raises: ConfigError when what the file says of its tokens cannot be of its tokens."""
    for name in ("token_type", "scores"):
        values = file.metadata.get(f"tokenizer.ggml.{name}")
        if values and len(values) != num_tokens:
            raise ConfigError(
                f"{file.path} is damaged: tokenizer.ggml.{name} has {len(values)} entries for {num_tokens} tokens; "
                "download it again"
            )
    names = ("bos", "eos", "eot", "eom", "unknown", "padding")
    for name in (f"{name}_token_id" for name in names):
        token_id = file.metadata.get(f"tokenizer.ggml.{name}")
        if token_id is not None and not 0 <= token_id < num_tokens:
            raise ConfigError(
                f"{file.path} is damaged: tokenizer.ggml.{name} is {token_id}, and there are {num_tokens} tokens; "
                "download it again"
            )


def _byte_level(file: GgufFile, pre: str, vocabulary: Sequence[str]) -> tokenizers.Tokenizer:
    merges = [_pair(merge) for merge in file.metadata.get("tokenizer.ggml.merges") or ()]
    ids = {token: token_id for token_id, token in enumerate(vocabulary)}
    model = models.BPE(vocab=ids, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(file, pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _pre_tokenizer(file: GgufFile, pre: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _GPT2:
        return gpt2
    if pre in _DIGITS_THEN_GPT2:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre in _SPLIT_BY_PRE:
        split = pre_tokenizers.Split(Regex(_SPLIT_BY_PRE[pre]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join((*_GPT2, *_DIGITS_THEN_GPT2, *_SPLIT_BY_PRE))
    raise ConfigError(
        f"{file.path}: pre-tokenizer {brief(pre)} is not known (known: {known}); use the model's safetensors "
        "directory, which has a tokenizer.json"
    )


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: Sequence[str]) -> tokenizers.Tokenizer:
    ids = {token: token_id for token_id, token in enumerate(vocabulary)}
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(vocabulary)
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(vocabulary)
    unknown = next((token for token, kind in zip(vocabulary, types, strict=True) if kind == _UNKNOWN), None)
    merges = _merges_of_scores(vocabulary, scores, types)
    model = models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if has_prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return backend


def _merges_of_scores(
    vocabulary: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score of the result first (SentencePiece's own order)."""
    pieces = {
        token: (token_id, score)
        for token_id, (token, score, kind) in enumerate(zip(vocabulary, scores, types, strict=True))
        if kind in (_NORMAL, _USER_DEFINED)
    }
    found = []
    for token, (token_id, score) in pieces.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                found.append((-score, token_id, pieces[left][0], pieces[right][0], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens and ends become special ones, user-defined tokens are matched whole. Mutates: `backend`."""
    typed = [(t, _CONTROL if t in END_NAMES else k) for t, k in zip(vocabulary, types, strict=False)]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in typed if k == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in typed if k == _USER_DEFINED])


def _add_post_processor(
    backend: tokenizers.Tokenizer,
    metadata: Mapping[str, Any],
    vocabulary: Sequence[str],
    is_byte_level: bool,
    adds_bos: bool,
) -> None:
    """Put BOS before and EOS after a prompt where the file asks for them. Mutates: `backend`."""
    bos, eos = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos"))
    before = [bos] if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else []
    after = [eos] if eos is not None and metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if before or after:
        template = [*(vocabulary[token_id] for token_id in before), "$A", *(vocabulary[token_id] for token_id in after)]
        special = [(vocabulary[token_id], token_id) for token_id in {*before, *after}]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    elif is_byte_level:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)

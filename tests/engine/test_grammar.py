"""Grammars over tokenizers of every kind: which texts they let through, however these are cut into tokens."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
from grammar_cases import TOKENIZER, compiler
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from blendserve.dialect.grammars import check_grammar
from blendserve.engine.grammar import MAX_KEPT_GRAMMARS, GrammarCompiler
from blendserve.errors import RequestError
from blendserve.models.tokenizer import Tokenizer
from blendserve.request import StructuredOutputs


@cache
def byte_fallback() -> Tokenizer:
    """SentencePiece style: `▁` for spaces, pieces that span parts of JSON, bytes for what has no piece."""
    joined = [
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
        '"',
        ":",
        ",",
        "{",
        "}",
        '":',
        '{"',
        '",',
        '":▁"',
        "▁tr",
        "ue",
        "😀",
        "\\",
        "\\u",
        "00",
    ]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *joined]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<|call|>"])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(backend, (2,))


@cache
def compiler_of(kind: str) -> GrammarCompiler:
    tokenizer = TOKENIZER if kind == "byte-level" else byte_fallback()
    return compiler(tokenizer, max(320, tokenizer.backend.get_vocab_size()))


def lets_through(kind: str, structure: StructuredOutputs, text: str, seed: int = 0) -> bool:
    """Can a sequence say just this text, cut into tokens at random among those that the masks allow?"""
    made, pick = compiler_of(kind), random.Random(seed)
    tokenizer = TOKENIZER if kind == "byte-level" else byte_fallback()
    special = {token: str(tokenizer.backend.id_to_token(token)) for token in tokenizer.special_token_ids}
    matcher, left = made.start(structure), text.encode()
    while left:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        words = {
            token: special[token].encode() if token in special else tokenizer.token_bytes(token)
            for token in np.flatnonzero(bits).tolist()
        }
        fitting = [token for token, word in words.items() if word and left.startswith(word)]
        if not fitting:
            return False
        token = pick.choice(fitting)
        assert matcher.consume_token(token)
        left = left[len(words[token]) :]
    return matcher.is_accepting()


TEXT = StructuredOutputs(json='{"type": "string"}')
OBJECT = StructuredOutputs(
    json=json.dumps(
        {
            "type": "object",
            "properties": {"a": {"type": "string"}, "b": {"type": "boolean"}, "c": {"type": "null"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
    )
)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize(
    ("structure", "text"),
    [
        (TEXT, '""'),
        (TEXT, '"ab \\" \\\\ \\n"'),
        (TEXT, '"\\u0041\\u00e9"'),
        (TEXT, '"\\ud83d\\ude00"'),
        (TEXT, '"😀 é 日本"'),
        (OBJECT, '{"a": "ab", "b": true}'),
        (OBJECT, '{"a":"","b":false,"c":null}'),
        (OBJECT, '{\n  "a": "x",\n  "b": true\n}'),
        (StructuredOutputs(json_object=True), '{"a": {"b": [1, -2.5e3, "😀"]}}'),
        (StructuredOutputs(choice=("ab", "a", "😀\n")), "a"),
        (StructuredOutputs(choice=("ab", "a", "😀\n")), "😀\n"),
        (StructuredOutputs(regex="[ab]+ (é|😀)"), "abba 😀"),
        (StructuredOutputs(grammar='root ::= "a" | "(" root ")"'), "((a))"),
        (StructuredOutputs(grammar='start: "a" | "(" start ")"'), "((a))"),
        (StructuredOutputs(lark='start: "call " %json {"type": "integer"}'), "call 12"),
    ],
)
def test_texts_that_fit_get_through_however_they_are_cut(kind: str, structure: StructuredOutputs, text: str) -> None:
    for seed in range(6):
        assert lets_through(kind, structure, text, seed), seed


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize(
    ("structure", "text"),
    [
        (TEXT, '"\\ud83d"'),
        (TEXT, '"a\nb"'),
        (TEXT, '"a'),
        (TEXT, '"a" b'),
        (OBJECT, '{"b": true}'),
        (OBJECT, '{"a": "", "b": true, "d": 1}'),
        (OBJECT, '{"a": "", "b": true,}'),
        (OBJECT, '{"a":' + " " * 40 + '"", "b": true}'),
        (StructuredOutputs(json_object=True), "[1]"),
        (StructuredOutputs(choice=("ab", "a")), "b"),
        (StructuredOutputs(regex="[ab]+"), "abc"),
    ],
)
def test_texts_that_do_not_fit_stay_out(kind: str, structure: StructuredOutputs, text: str) -> None:
    for seed in range(6):
        assert not lets_through(kind, structure, text, seed), seed


@pytest.mark.parametrize("marker", ["</think>", "<|call|>", "e"])
def test_a_grammar_begins_after_its_marker(marker: str) -> None:
    integer = StructuredOutputs(json='{"type": "integer"}', after=marker)
    for text in ("", "no", f"so {marker}12", f"{marker}\n\n-3", f"a\nb 😀{marker} 0"):
        assert lets_through("byte-fallback", integer, text), text
    for text in (marker, f"so {marker}x", f"so {marker}1{marker}", f"{marker}true"):
        assert not lets_through("byte-fallback", integer, text), text


def test_a_schema_cannot_loosen_the_grammar() -> None:
    guided = {"x-guidance": {"lenient": True, "coerce_one_of": True, "whitespace_flexible": False}}
    for schema in ({"type": "array", "uniqueItems": True}, {"oneOf": [{"type": "number"}, {"type": "integer"}]}):
        with pytest.raises(RequestError):
            compiler_of("byte-level").start(StructuredOutputs(json=json.dumps({**schema, **guided})))


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        (StructuredOutputs(json='{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (StructuredOutputs(json='{"$ref": "#/$defs/x"}'), "/$defs/x"),
        (StructuredOutputs(json='{"$ref": "http://localhost/x.json"}'), "http://localhost/x.json"),
        (StructuredOutputs(json='{"if": {}, "then": {}}'), '["if", "then"]'),
        (StructuredOutputs(json='{"type": "string", "minLength": 5, "maxLength": 2}'), "minLength"),
        (StructuredOutputs(json='{"type": "string", "pattern": "(?=a)"}'), "look-around"),
        (StructuredOutputs(regex="a{2"), "a{2"),
        (StructuredOutputs(grammar="root ::= x"), "x"),
    ],
)
def test_a_refusal_names_what_it_is_about(structure: StructuredOutputs, words: str) -> None:
    for check in (check_grammar, compiler_of("byte-level").start):
        with pytest.raises(RequestError) as refusal:
            check(structure)
        assert words in refusal.value.message
        assert refusal.value.status_code == 400


def test_endless_work_is_refused_by_counting() -> None:
    """Nothing here takes long: what is refused is refused before it is tried."""
    hard = (
        StructuredOutputs(regex="(((((a{1,99}){1,99}){1,99}){1,99}b?){1,99}c?){1,99}"),
        StructuredOutputs(json=json.dumps({"type": "string", "pattern": "^((a|b)*c(a|b){30000})$"})),
        StructuredOutputs(json=json.dumps({"enum": [f"x{i}" for i in range(20_000)]})),
    )
    for structure in hard:
        with suppress(RequestError):
            matcher = compiler_of("byte-level").start(structure)
            matcher.compute_bitmask()


def test_only_so_many_grammars_are_kept() -> None:
    made = compiler()
    for number in range(MAX_KEPT_GRAMMARS + 10):
        made.start(StructuredOutputs(choice=(str(number),)))
    assert len(made._kept) == MAX_KEPT_GRAMMARS
    made.start(StructuredOutputs(choice=(str(MAX_KEPT_GRAMMARS + 9),)))
    assert made.stats.num_grammars == MAX_KEPT_GRAMMARS + 10
    made.start(StructuredOutputs(choice=("0",)))
    assert made.stats.num_grammars == MAX_KEPT_GRAMMARS + 11


def test_a_model_without_an_end_of_text_is_refused() -> None:
    endless = GrammarCompiler(TOKENIZER, 320, ())
    with pytest.raises(RequestError, match="end-of-text token"):
        endless.start(StructuredOutputs(choice=("a",)))

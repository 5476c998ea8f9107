"""Words as token sequences, by vLLM's rule."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from blendserve.models.bad_words import BadWords
from blendserve.models.tokenizer import Tokenizer

VOCABULARY = ["<unk>", "a", "b", "Ġ", "Ġa", "ab", "Ġab"]
A, B, SPACE, SPACE_A, AB, SPACE_AB = range(1, 7)


def bad_words() -> BadWords:
    """Byte-level BPE: " a" and " ab" are one token each, " b" is two."""
    merges = [("Ġ", "a"), ("a", "b"), ("Ġa", "b"), ("Ġ", "ab")]
    backend = tokenizers.Tokenizer(models.BPE({token: at for at, token in enumerate(VOCABULARY)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return BadWords(Tokenizer(backend))


def test_a_word_is_banned_at_the_beginning_and_after_a_space() -> None:
    assert set(bad_words()(("a",))) == {(A,), (SPACE_A,)}
    assert set(bad_words()(("  a",))) == {(A,), (SPACE_A,)}, "spaces in front do not count"


def test_a_space_in_front_is_no_other_word_where_it_is_a_token_of_its_own() -> None:
    assert bad_words()(("b",)) == [(B,)]
    assert (SPACE, B) not in bad_words()(("b",))


def test_several_words_and_words_of_several_tokens() -> None:
    found = bad_words()(("ab", "ba"))
    assert found[0] == (AB,)
    assert (B, A) in found


def test_what_comes_to_no_token_bans_nothing() -> None:
    assert bad_words()((" ",)) == []
    assert bad_words()(()) == ()

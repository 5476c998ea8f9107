"""Text of tokens with stop strings: against the plain definition on whole decoded texts, token by token."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_files import byte_level_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from blendserve.models.detokenize import StopChecker, num_torn_bytes, text_of
from blendserve.models.tokenizer import Tokenizer
from blendserve.request import Request, SamplingParams


@cache
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_tokenizer(320), (2,))


@cache
def byte_fallback() -> Tokenizer:
    """SentencePiece style: `▁` for spaces, the first one dropped, bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, (2,))


TOKENIZERS = {"byte-level": byte_level, "byte-fallback": byte_fallback}
PLAIN = SamplingParams()
texts = st.text(alphabet="ab é🚂\n.", max_size=20)
stops = st.lists(st.text(alphabet="ab é🚂", min_size=1, max_size=4), max_size=3)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).tolist()  # type: ignore[no-any-return]


def first_stop(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> tuple[int, int, str] | None:
    """(tokens needed, where the text is cut, stop string), on whole decoded texts; whole characters only."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        found = [(at, string) for string in stop if (at := text.find(string)) >= 0]
        if found:
            return (count, *min(found))
    return None


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=texts, stop=stops)
@example(text="🚂é", stop=["é"])  # the checker looks at the last bytes only, and those begin inside a character
def test_the_engines_checker_stops_at_the_same_token_and_text(kind: str, text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = ids_of(tokenizer, text)
    checker = StopChecker(tokenizer)
    request = Request(0, np.zeros(1, np.int32), 1, SamplingParams(stop=tuple(stop)), 100)
    found = None
    for count in range(1, len(ids) + 1):
        if (reason := checker(request, np.array(ids[:count], np.int32))) is not None:
            found = (count, reason)
            break
    expected = first_stop(tokenizer, ids, stop)
    assert found == (None if expected is None else (expected[0], expected[2]))
    if found is not None and expected is not None:
        cut = text_of(tokenizer, np.array(ids[: found[0]], np.int32), "stop", found[1], PLAIN)
        assert cut == tokenizer.decode(ids)[: expected[1]]


def test_a_stop_string_of_before_min_tokens_does_not_count_later() -> None:
    """The engine asks only from `min_tokens` on; a match must end in the latest token."""
    tokenizer = byte_level()
    (a,), (b,) = ids_of(tokenizer, "a"), ids_of(tokenizer, "b")
    request = Request(0, np.zeros(1, np.int32), 1, SamplingParams(stop=("ab",), min_tokens=3), 100)
    checker = StopChecker(tokenizer)
    assert checker(request, np.array([a, b, a], np.int32)) is None
    ids = np.array([a, b, a, b], np.int32)
    assert checker(request, ids) == "ab"
    assert text_of(tokenizer, ids, "stop", "ab", PLAIN) == "ab"


def test_special_tokens_between_do_not_hide_a_stop_string() -> None:
    tokenizer = byte_level()
    (a,), (b,) = ids_of(tokenizer, "a"), ids_of(tokenizer, "b")
    request = Request(0, np.zeros(1, np.int32), 1, SamplingParams(stop=("ab",)), 100)
    assert StopChecker(tokenizer)(request, np.array([a, *[1] * 20, b], np.int32)) == "ab"
    assert StopChecker(tokenizer)(request, np.array([a, b, 1], np.int32)) is None


def test_text_of_every_ending() -> None:
    tokenizer = byte_level()
    ids = np.array([*ids_of(tokenizer, "the end"), 2], dtype=np.int32)
    word = np.array(ids_of(tokenizer, "the a"), dtype=np.int32)
    assert text_of(tokenizer, ids, "stop", None, PLAIN) == "the end"
    assert text_of(tokenizer, ids, "length", None, PLAIN) == "the end"
    assert text_of(tokenizer, word, "stop", int(word[-1]), PLAIN) == tokenizer.decode(word[:-1])
    assert text_of(tokenizer, word[:0], "stop", None, PLAIN) == ""
    assert text_of(tokenizer, word[:0], "length", None, PLAIN) == ""


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab é🚂\ufffd", max_size=12), count=st.integers(0, 40))
@example(text="é🚂", count=5)  # a decoder of byte tokens loses the whole characters before a torn one
@example(text="a\ufffd", count=40)  # the character itself is no torn one
def test_a_character_that_the_end_cuts_is_left_out(kind: str, text: str, count: int) -> None:
    """The text of so many tokens is what their bytes hold in whole characters."""
    tokenizer = TOKENIZERS[kind]()
    ids = ids_of(tokenizer, text)[:count]
    data = b"".join(map(tokenizer.token_bytes, ids))
    expected = data[: len(data) - num_torn_bytes(data)].decode()
    if kind == "byte-fallback":
        expected = expected.removeprefix(" ")
    assert text_of(tokenizer, np.array(ids, np.int32), "length", None, PLAIN) == expected
    assert text_of(tokenizer, np.array([*ids, 2], np.int32), "stop", None, PLAIN) == expected


@pytest.mark.parametrize(
    ("data", "num_torn"),
    [
        (b"", 0),
        (b"abc", 0),
        ("é".encode(), 0),
        ("é".encode()[:1], 1),
        ("a🚂".encode()[:-1], 3),
        ("🚂".encode() + "€".encode()[:2], 2),
        (b"\x80", 0),
        (b"\xff", 0),
        ("\ufffd".encode(), 0),
    ],
)
def test_torn_bytes_are_those_that_more_could_make_a_character_of(data: bytes, num_torn: int) -> None:
    assert num_torn_bytes(data) == num_torn


def test_bytes_that_are_no_character_stay_visible() -> None:
    tokenizer = byte_fallback()
    lone = [tokenizer.backend.token_to_id("<0x80>"), *ids_of(tokenizer, "a")]
    assert "\ufffd" in text_of(tokenizer, np.array(lone, np.int32), "length", None, PLAIN)


def test_the_text_may_keep_what_ended_it() -> None:
    tokenizer = byte_level()
    keeps = SamplingParams(include_stop_str_in_output=True)
    ids = np.array(ids_of(tokenizer, "of the"), np.int32)
    assert tokenizer.decode(ids[-1:]) == " the"
    assert text_of(tokenizer, ids, "stop", " t", keeps) == "of t", "what follows the string goes"
    assert text_of(tokenizer, ids, "stop", " t", PLAIN) == "of"
    (a,), (b,) = ids_of(tokenizer, "a"), ids_of(tokenizer, "b")
    assert text_of(tokenizer, np.array([a, b], np.int32), "stop", b, keeps) == "ab"
    assert text_of(tokenizer, np.array([a, b], np.int32), "stop", b, PLAIN) == "a"
    assert text_of(tokenizer, np.array([a, 2], np.int32), "stop", None, keeps) == "a", "the end token is special"
    both = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False)
    assert text_of(tokenizer, np.array([a, 2], np.int32), "stop", None, both) == "a</s>"


def test_special_tokens_are_shown_and_looked_at_where_they_are_not_skipped() -> None:
    tokenizer = byte_level()
    (a,) = ids_of(tokenizer, "a")
    shows = SamplingParams(skip_special_tokens=False, stop=("a</s>",))
    ids = np.array([1, a, 2], np.int32)
    assert text_of(tokenizer, ids, "length", None, shows) == "<s>a</s>"
    assert text_of(tokenizer, ids, "length", None, PLAIN) == "a"
    request = Request(0, np.zeros(1, np.int32), 1, shows, 100)
    assert StopChecker(tokenizer)(request, ids) == "a</s>"
    assert StopChecker(tokenizer)(request, ids[:2]) is None
    assert text_of(tokenizer, ids, "stop", "a</s>", shows) == "<s>"


def test_no_text_is_made_where_none_is_wanted() -> None:
    tokenizer = byte_level()
    ids = np.array(ids_of(tokenizer, "the end"), np.int32)
    assert text_of(tokenizer, ids, "length", None, SamplingParams(detokenize=False)) == ""

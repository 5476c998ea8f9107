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

from blendserve.models.detokenize import StopChecker, text_of
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
        cut = text_of(tokenizer, np.array(ids[: found[0]], np.int32), "stop", found[1])
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
    assert text_of(tokenizer, ids, "stop", "ab") == "ab"


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
    assert text_of(tokenizer, ids, "stop", None) == "the end"
    assert text_of(tokenizer, ids, "length", None) == "the end"
    assert text_of(tokenizer, word, "stop", int(word[-1])) == tokenizer.decode(word[:-1])
    assert text_of(tokenizer, word[:0], "stop", None) == ""
    assert text_of(tokenizer, word[:0], "length", None) == ""

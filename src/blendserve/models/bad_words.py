"""`bad_words` as token sequences: the last token of one must not follow the others. Source: vLLM's rule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from blendserve.models.tokenizer import Tokenizer

Words = Sequence[tuple[int, ...]]


class BadWords:
    """Looks words up in a tokenizer, and remembers the latest sets: many requests give the same one.

    Of each word there are two sequences, as it stands at the beginning of a text and after a space. The second counts
    where it begins with another token and is as long as the first: else it is a space and the first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._found = lru_cache(maxsize=256)(self._look_up)

    def __call__(self, words: tuple[str, ...]) -> Words:
        return self._found(words) if words else ()

    def _look_up(self, words: tuple[str, ...]) -> Words:
        stripped = [word.lstrip() for word in words]
        texts = [text for word in stripped for text in (word, f" {word}")]
        encoded = [tuple(ids.tolist()) for ids in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        found: list[tuple[int, ...]] = []
        for plain, spaced in zip(encoded[::2], encoded[1::2], strict=True):
            if plain:
                found.append(plain)
            if plain and spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
                found.append(spaced)
        return found

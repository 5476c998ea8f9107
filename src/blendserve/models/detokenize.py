"""Output tokens to text, with stop strings as OpenAI means them (cut off, with all that follows).

A stop string may span tokens and a token may end inside a character, so every decision is made on decoded text.
"""

from __future__ import annotations

from blendserve.models.tokenizer import Tokenizer
from blendserve.request import FinishReason, Request, SequenceOutput, TokenIds

_MAX_CHARACTER_BYTES = 4
_REPLACEMENT = "\ufffd"  # what `decode` gives for bytes that are not (yet) a character


class StopChecker:
    """Tells the engine whether the latest token has completed a stop string. Keeps no state between calls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, request: Request, output_token_ids: TokenIds) -> str | None:
        """The stop string that ends in the latest token, the earliest one where several do; None when there is none."""
        stops = request.sampling.stop
        if not stops or not len(output_token_ids):
            return None
        tail, text = self._tail(output_token_ids, max(len(stop.encode("utf-8", "replace")) for stop in stops))
        if not any(stop in text for stop in stops):
            return None
        before = self._tokenizer.decode(tail[:-1])
        found = [(at, stop) for stop in stops if (at := find_new(text, before, stop)) >= 0]
        return min(found)[1] if found else None

    def _tail(self, token_ids: TokenIds, num_bytes: int) -> tuple[list[int], str]:
        """The last tokens, enough to hold `num_bytes` of text before the last of them, and their text.

        Every token that is not special holds at least one byte; one more keeps the first from losing its leading space.
        Where the first begins inside a character, some decoders lose those after it too: it gets the bytes before it.
        """
        tail: list[int] = []
        text = ""
        for num_tokens in range(num_bytes + 2, num_bytes + 2 + _MAX_CHARACTER_BYTES):
            tail = self._last(token_ids, num_tokens)
            text = self._tokenizer.decode(tail)
            if not text.startswith(_REPLACEMENT):
                break
        return tail, text

    def _last(self, token_ids: TokenIds, num_tokens: int) -> list[int]:
        """The last tokens that are not special, and the latest whatever it is."""
        special = self._tokenizer.special_token_ids
        tail: list[int] = []
        for token_id in token_ids[::-1].tolist():
            if token_id not in special or not tail:
                tail.append(token_id)
            if len(tail) == num_tokens:
                break
        return tail[::-1]


def find_new(text: str, before: str, stop: str) -> int:
    """Where `stop` first begins in `text` without being all inside `before`, the text one token earlier; else -1."""
    num_known = len(before.rstrip(_REPLACEMENT))
    return text.find(stop, max(0, num_known - len(stop) + 1))


def text_of(
    tokenizer: Tokenizer,
    token_ids: TokenIds,
    finish_reason: FinishReason,
    stop_reason: int | str | None,
    *,
    has_stop_token: bool = True,
) -> str:
    """Text of a finished sequence: without special tokens, its stop token, or its stop string and what follows it."""
    if finish_reason != "stop" or not has_stop_token or not len(token_ids):
        return tokenizer.decode(token_ids)
    before = tokenizer.decode(token_ids[:-1])
    if not isinstance(stop_reason, str):
        return before
    text = tokenizer.decode(token_ids)
    end = find_new(text, before, stop_reason)
    return text if end < 0 else text[:end]


def marked_text_of(tokenizer: Tokenizer, output: SequenceOutput, kept: frozenset[int]) -> str:
    """The same with those special tokens that are in `kept`; the last token too, where it is one of them."""
    token_ids, stop = output.token_ids, output.stop_reason
    if output.finish_reason != "stop" or not output.has_stop_token or not len(token_ids):
        return tokenizer.decode_keeping(token_ids, kept)
    if not isinstance(stop, str):
        return tokenizer.decode_keeping(token_ids if int(token_ids[-1]) in kept else token_ids[:-1], kept)
    text = tokenizer.decode_keeping(token_ids, kept)
    end = find_new(text, tokenizer.decode_keeping(token_ids[:-1], kept), stop)
    return text if end < 0 else text[:end]

"""Output tokens to text, with stop strings as OpenAI means them (cut off, with all that follows).

A stop string may span tokens and a token may end inside a character, so every decision is made on decoded text.
"""

from __future__ import annotations

import codecs

from blendserve.models.tokenizer import Tokenizer
from blendserve.request import FinishReason, Request, SamplingParams, SequenceOutput, TokenIds

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
        skips = request.sampling.skip_special_tokens
        tail, text = self._tail(output_token_ids, max(len(stop.encode("utf-8", "replace")) for stop in stops), skips)
        if not any(stop in text for stop in stops):
            return None
        before = self._tokenizer.decode(tail[:-1], skips)
        found = [(at, stop) for stop in stops if (at := find_new(text, before, stop)) >= 0]
        return min(found)[1] if found else None

    def _tail(self, token_ids: TokenIds, num_bytes: int, skips_special: bool) -> tuple[list[int], str]:
        """The last tokens, enough to hold `num_bytes` of text before the last of them, and their text.

        Every token that is not special holds at least one byte; one more keeps the first from losing its leading space.
        Where the first begins inside a character, some decoders lose those after it too: it gets the bytes before it.
        """
        tail: list[int] = []
        text = ""
        for num_tokens in range(num_bytes + 2, num_bytes + 2 + _MAX_CHARACTER_BYTES):
            tail = self._last(token_ids, num_tokens) if skips_special else token_ids[-num_tokens:].tolist()
            text = self._tokenizer.decode(tail, skips_special)
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
    sampling: SamplingParams,
    *,
    has_stop_token: bool = True,
) -> str:
    """Text of a finished sequence, as its parameters want it: by default without special tokens, its stop token, or its
    stop string and what follows it. A character that the end cut is left out.
    """
    if not sampling.detokenize:
        return ""
    skips, includes = sampling.skip_special_tokens, sampling.include_stop_str_in_output
    kept = frozenset[int]() if skips else tokenizer.special_token_ids
    if finish_reason != "stop" or not has_stop_token or not len(token_ids):
        return _whole_text(tokenizer, token_ids, kept)
    if not isinstance(stop_reason, str):
        return _whole_text(tokenizer, token_ids if includes else token_ids[:-1], kept)
    before, text = tokenizer.decode(token_ids[:-1], skips), tokenizer.decode(token_ids, skips)
    end = find_new(text, before, stop_reason)
    return text if end < 0 else text[: end + len(stop_reason) * includes]


def marked_text_of(
    tokenizer: Tokenizer, output: SequenceOutput, sampling: SamplingParams, marks: frozenset[int]
) -> str:
    """The same with those special tokens that are in `marks`; the last token too, where it is one of them."""
    if not sampling.detokenize:
        return ""
    kept = marks if sampling.skip_special_tokens else tokenizer.special_token_ids
    token_ids, stop = output.token_ids, output.stop_reason
    if output.finish_reason != "stop" or not output.has_stop_token or not len(token_ids):
        return _whole_text(tokenizer, token_ids, kept)
    if not isinstance(stop, str):
        includes = sampling.include_stop_str_in_output or int(token_ids[-1]) in marks
        return _whole_text(tokenizer, token_ids if includes else token_ids[:-1], kept)
    text = tokenizer.decode_keeping(token_ids, kept)
    end = find_new(text, tokenizer.decode_keeping(token_ids[:-1], kept), stop)
    return text if end < 0 else text[: end + len(stop) * sampling.include_stop_str_in_output]


def _whole_text(tokenizer: Tokenizer, token_ids: TokenIds, kept: frozenset[int]) -> str:
    """The text up to the last whole character, with those special tokens that are in `kept`.

    The tokens of a torn character are taken away before decoding, as some decoders lose the characters before it too;
    where its first token also ends another character, the mark that stands for the torn bytes goes.
    """
    dropped = tokenizer.special_token_ids - kept
    shown = [token_id for token_id in token_ids.tolist() if token_id not in dropped]
    num_torn = num_torn_bytes(b"".join(map(tokenizer.token_bytes, shown[-_MAX_CHARACTER_BYTES:])))
    while num_torn and len(data := tokenizer.token_bytes(shown[-1])) <= num_torn:
        num_torn -= len(data)
        shown.pop()
    text = tokenizer.decode(shown, skip_special_tokens=False)
    return text.removesuffix(_REPLACEMENT) if num_torn else text


def num_torn_bytes(data: bytes) -> int:
    """How many bytes at the end begin a character of UTF-8 that is not whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return len(decoder.getstate()[0])

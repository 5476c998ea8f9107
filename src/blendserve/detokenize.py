"""Output tokens to text: incrementally, and with stop strings as OpenAI means them (cut off, with all that follows).

A stop string may span tokens and a token may end inside a character, so every decision is made on decoded text.
"""

from __future__ import annotations

from collections.abc import Sequence

from blendserve.models.tokenizer import Tokenizer
from blendserve.request import FinishReason, Request, TokenIds

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
        tail = self._tail(output_token_ids, max(len(stop.encode("utf-8", "replace")) for stop in stops))
        text = self._tokenizer.decode(tail)
        if not any(stop in text for stop in stops):
            return None
        before = self._tokenizer.decode(tail[:-1])
        found = [(at, stop) for stop in stops if (at := find_new(text, before, stop)) >= 0]
        return min(found)[1] if found else None

    def _tail(self, token_ids: TokenIds, num_bytes: int) -> list[int]:
        """The last tokens, enough to hold `num_bytes` of text before the last of them.

        Every token that is not special holds at least one byte; one more keeps the first from losing its leading space.
        """
        special = self._tokenizer.special_token_ids
        tail: list[int] = []
        for token_id in token_ids[::-1].tolist():
            if token_id not in special or not tail:
                tail.append(token_id)
            if len(tail) > num_bytes + 1:
                break
        return tail[::-1]


def find_new(text: str, before: str, stop: str) -> int:
    """Where `stop` first begins in `text` without being all inside `before`, the text one token earlier; else -1."""
    num_known = len(before.rstrip(_REPLACEMENT))
    return text.find(stop, max(0, num_known - len(stop) + 1))


def text_of(
    tokenizer: Tokenizer, token_ids: TokenIds, finish_reason: FinishReason, stop_reason: int | str | None
) -> str:
    """Text of a finished sequence: without special tokens, its stop token, or its stop string and what follows it."""
    if finish_reason != "stop" or not len(token_ids):
        return tokenizer.decode(token_ids)
    before = tokenizer.decode(token_ids[:-1])
    if not isinstance(stop_reason, str):
        return before
    text = tokenizer.decode(token_ids)
    end = find_new(text, before, stop_reason)
    return text if end < 0 else text[:end]


class IncrementalDetokenizer:
    """Text of one sequence as its tokens come in, for streams. `text` never has to be taken back: it ends before a
    character that is not whole yet and before what may turn out to be the beginning of a stop string.

    Mutates: itself, on `add`; after `stopped_by` is set, nothing more is added.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._whole = ""  # all text that is certain to be characters
        self._prefix_begin = 0  # tokens from here on are decoded again with each new one, for context
        self._whole_end = 0  # tokens up to here are in `_whole`
        self.text = ""
        self.stopped_by: str | None = None

    def add(self, token_id: int) -> str:
        """Take one more token; returns the text that is new and final."""
        if self.stopped_by is not None:
            return ""
        self._token_ids.append(token_id)
        before = self._whole
        self._extend_whole()
        found = [(at, stop) for stop in self._stop if (at := find_new(self._whole, before, stop)) >= 0]
        if found:
            end, self.stopped_by = min(found)
            return self._release(end)
        return self._release(len(self._whole) - max((_overlap(self._whole, stop) for stop in self._stop), default=0))

    def finish(self) -> str:
        """No more tokens come; returns the text that was held back, a cut character as U+FFFD."""
        if self.stopped_by is None:
            self._whole += self._pending()
            self._whole_end = len(self._token_ids)
            return self._release(len(self._whole))
        return ""

    def _pending(self) -> str:
        """Text of the tokens that are not in `_whole`, decoded after some that are: decoders look at neighbours."""
        context = self._tokenizer.decode(self._token_ids[self._prefix_begin : self._whole_end])
        return self._tokenizer.decode(self._token_ids[self._prefix_begin :])[len(context) :]

    def _extend_whole(self) -> None:
        pending = self._pending()
        if pending.endswith(_REPLACEMENT):
            return
        self._whole += pending
        self._prefix_begin, self._whole_end = self._whole_end, len(self._token_ids)

    def _release(self, end: int) -> str:
        new = self._whole[len(self.text) : end]
        self.text += new
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)

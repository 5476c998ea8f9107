"""Conversations to prompts: rendered by the chat template, then encoded.

What users write cannot become control tokens: where a user's or a tool's text holds one (`<|im_end|>`, say), those
characters alone are encoded as plain text. All other texts are encoded as they always were.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from blendserve.errors import RequestError
from blendserve.models.conversation import Conversation, Message
from blendserve.models.tokenizer import Tokenizer
from blendserve.request import TokenIds

if TYPE_CHECKING:
    import tokenizers

_GUARDED_ROLES = ("user", "tool")
_MARKS = range(0xE000, 0xF8FF, 2)
"""Characters for private use, which stand around the number of a control token while a template has the text."""


class EncodedChat(NamedTuple):
    """The prompt of one conversation, and its tokens. None and an error where there is none."""

    text: str | None
    token_ids: TokenIds | RequestError


@dataclass(frozen=True, slots=True)
class _Guard:
    """Control tokens taken out of a conversation: number k stands there as `first` k `last`."""

    conversation: Conversation
    first: str = ""
    last: str = ""
    texts: tuple[str, ...] = ()

    def pieces(self, rendered: str) -> list[str]:
        """The prompt cut at them; every second piece is one."""
        if not self.texts:
            return [rendered]
        first, last = (f"(?:{mark}|{re.escape(_escaped(mark))})" for mark in (self.first, self.last))
        pieces = re.split(rf"{first}(\d+){last}", rendered)
        return [self.texts[int(piece)] if at % 2 else piece for at, piece in enumerate(pieces)]


class ChatEncoder:
    """`obeys_control_tokens`: the texts of users may hold control tokens, as in vLLM."""

    def __init__(self, tokenizer: Tokenizer, *, obeys_control_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._obeys = obeys_control_tokens

    def encode_each(self, conversations: Sequence[Conversation], max_tokens: int = 0) -> list[EncodedChat]:
        """Every conversation, or why it gives no prompt; a prompt of more than `max_tokens` (0: no limit) may be
        refused before it is encoded. Raises: ConfigError when the model has no chat template.
        """
        if not conversations:
            return []
        guards = [self._guard(conversation) for conversation in conversations]
        rendered = self._tokenizer.render_each([guard.conversation for guard in guards])
        pieces = [
            [] if isinstance(text, RequestError) else guard.pieces(text)
            for guard, text in zip(guards, rendered, strict=True)
        ]
        whole = [of_one[0] for of_one in pieces if len(of_one) == 1]
        encoded = iter(self._tokenizer.encode_each(whole, False, max_tokens))
        found = []
        for text, of_one in zip(rendered, pieces, strict=True):
            if isinstance(text, RequestError):
                found.append(EncodedChat(None, text))
            elif len(of_one) == 1:
                found.append(EncodedChat(of_one[0], next(encoded)))
            else:
                found.append(EncodedChat("".join(of_one), self._encode_pieces(of_one, max_tokens)))
        return found

    def _guard(self, conversation: Conversation) -> _Guard:
        pattern = self._control_tokens
        if pattern is None or not any(_holds(pattern, message) for message in conversation.messages):
            return _Guard(conversation)
        everything = str(conversation)
        first, last = next(
            (chr(mark), chr(mark + 1))
            for mark in _MARKS
            if not any(chr(m) in everything or _escaped(chr(m)) in everything for m in (mark, mark + 1))
        )
        texts: list[str] = []

        def take(match: re.Match[str]) -> str:
            texts.append(match[0])
            return f"{first}{len(texts) - 1}{last}"

        messages = tuple(_changed(pattern, take, message) for message in conversation.messages)
        return _Guard(replace(conversation, messages=messages), first, last, tuple(texts))

    def _encode_pieces(self, pieces: Sequence[str], max_tokens: int) -> TokenIds | RequestError:
        whole: list[TokenIds] = []
        for text, token_ids in zip(
            pieces[::2], self._tokenizer.encode_each(pieces[::2], False, max_tokens), strict=True
        ):
            if isinstance(token_ids, RequestError):
                return token_ids
            whole.append(token_ids if text else np.zeros(0, np.int32))
        plain = [
            np.array(encoding.ids, np.int32)
            for encoding in self._plain_backend.encode_batch_fast(list(pieces[1::2]), add_special_tokens=False)
        ]
        return np.concatenate([*chain.from_iterable(zip(whole, plain, strict=False)), whole[-1]])

    @cached_property
    def _control_tokens(self) -> re.Pattern[str] | None:
        """Every special token; None where texts may hold them, or where pieces would not be encoded as in the whole."""
        texts = sorted(self._tokenizer.special_texts, key=len, reverse=True)
        if self._obeys or not texts or not self._tokenizer.joins_pieces:
            return None
        return re.compile("|".join(map(re.escape, texts)))

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The tokenizer again, to which special tokens are text."""
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._tokenizer.backend.to_str())
        backend.encode_special_tokens = True
        return backend


def _escaped(mark: str) -> str:
    """As JSON in ASCII has it."""
    return f"\\u{ord(mark):04x}"


def _holds(pattern: re.Pattern[str], message: Message) -> bool:
    if message["role"] not in _GUARDED_ROLES:
        return False
    content = message["content"]
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
    return any(pattern.search(text) for text in texts)


def _changed(pattern: re.Pattern[str], take: Any, message: Message) -> Message:
    if not _holds(pattern, message):
        return message
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": pattern.sub(take, content)}
    return {**message, "content": [{**part, "text": pattern.sub(take, part["text"])} for part in content]}

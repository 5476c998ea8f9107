"""Text to token ids and back, for one model: a thin layer over `tokenizers`, with the model's chat template."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blendserve.errors import ConfigError, RequestError
from blendserve.models.conversation import Conversation
from blendserve.models.package_errors import MEANT, reason_of, told_as
from blendserve.request import TokenIds

if TYPE_CHECKING:
    import tokenizers

    from blendserve.models.template_process import TemplateProcess

_LONE_SURROGATES = re.compile("[\ud800-\udfff]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass
class Tokenizer:
    """A model's vocabulary. `special_tokens` are those its chat template may name (`bos_token`, `eos_token`, ...).
    `num_embeddings` is the number of tokens that the weights know, 0 where that is not known: `encode_each` refuses
    texts that hold others.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    eos_token_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template_source: str | None = field(default=None, repr=False)
    num_embeddings: int = 0
    tool_template_source: str | None = field(default=None, repr=False)
    """The template of conversations with tools, where they have one of their own."""
    template_date: datetime.date | None = None
    """What chat templates get as today. None: today."""

    def __post_init__(self) -> None:
        self.backend.no_truncation()
        self.backend.no_padding()

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template_source is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> TokenIds:
        """Shapes: int32[number of tokens]. `add_special_tokens` adds what a plain prompt needs around it (BOS)."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[TokenIds]:
        """Encode many texts on all cores. Lone surrogates, which no UTF-8 holds, count as U+FFFD."""
        try:
            encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError):
            cleaned = [_LONE_SURROGATES.sub("\ufffd", text) for text in texts]
            encoded = self.backend.encode_batch_fast(cleaned, add_special_tokens=add_special_tokens)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]

    def encode_each(
        self, texts: Sequence[str], add_special_tokens: bool = True, max_tokens: int = 0
    ) -> list[TokenIds | RequestError]:
        """Encode many texts, each or why it cannot be. A text that is certain to have more than `max_tokens` (0: no
        limit) is refused before the tokenizer spends time and memory on it.
        """
        refused = [self._too_long(text, max_tokens) for text in texts]
        encoded = iter(
            self._encode_or_isolate(
                [text for text, no in zip(texts, refused, strict=True) if no is None], add_special_tokens
            )
        )
        return [next(encoded) if no is None else no for no in refused]

    def _too_long(self, text: str, max_tokens: int) -> RequestError | None:
        if not max_tokens or len(text) <= max_tokens or len(text) <= max_tokens * self._most_characters:
            return None
        return RequestError(
            f"the prompt has {len(text)} characters, and the context of {max_tokens} tokens holds at most "
            f"{max_tokens * self._most_characters}: shorten the prompt",
            code="context_length_exceeded",
        )

    def _encode_or_isolate(self, texts: Sequence[str], add_special_tokens: bool) -> list[TokenIds | RequestError]:
        """One call for all; when it fails, halves, so that k bad texts of n cost about k log n calls more."""
        if not texts:
            return []
        try:
            return [self._known(token_ids) for token_ids in self.encode_batch(texts, add_special_tokens)]
        except MEANT:
            raise
        except BaseException as error:  # noqa: BLE001  # the package panics with what is no Exception
            if len(texts) == 1:
                reason = reason_of(error)
                return [RequestError(f"the tokenizer cannot encode this text: {reason}", code="invalid_value")]
        middle = len(texts) // 2
        halves = (texts[:middle], texts[middle:])
        return [token_ids for half in halves for token_ids in self._encode_or_isolate(half, add_special_tokens)]

    def _known(self, token_ids: TokenIds) -> TokenIds | RequestError:
        """The ids, or why the model cannot take them: tokenizers may have more tokens than weights have rows."""
        if not self.num_embeddings or not len(token_ids) or (largest := int(token_ids.max())) < self.num_embeddings:
            return token_ids
        return RequestError(
            f"the prompt holds the token {self.backend.id_to_token(largest)!r} ({largest}), and the model's weights "
            f"know tokens up to {self.num_embeddings - 1}: leave it out",
            code="invalid_value",
        )

    @cached_property
    def _most_characters(self) -> int:
        """Characters of the longest token: no token of a text stands for more."""
        return max(map(len, self.backend.get_vocab()), default=1)

    def decode(self, ids: TokenIds | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 (a character cut in half, say) come out as U+FFFD."""
        listed = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        with told_as("the model's tokenizer cannot turn its tokens into text"):
            return str(self.backend.decode(listed, skip_special_tokens=skip_special_tokens))

    def decode_keeping(self, ids: TokenIds | Sequence[int], kept: frozenset[int]) -> str:
        """Text of token ids with those special tokens that are in `kept`, and without the others."""
        dropped = self.special_token_ids - kept
        return self.decode([int(one) for one in ids if int(one) not in dropped], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to the text: not always whole characters, none for ids past the vocabulary."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self.added_token_ids:
            return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        if self._is_byte_level and all(char in _BYTE_BY_CHAR for char in token):
            return bytes(_BYTE_BY_CHAR[char] for char in token)
        return token.replace("▁", " ").encode()

    @cached_property
    def added_token_ids(self) -> frozenset[int]:
        """Tokens matched whole in the text, special or not."""
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that `decode` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def added_texts(self) -> frozenset[str]:
        """The texts of `added_token_ids`."""
        return frozenset(self.backend.id_to_token(token_id) or "" for token_id in self.added_token_ids)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of `special_token_ids`."""
        return tuple(self.backend.id_to_token(token_id) or "" for token_id in sorted(self.special_token_ids))

    @cached_property
    def joins_pieces(self) -> bool:
        """Do the tokens of a text's pieces, one behind the other, stand for that text? Not where every piece gets a
        space in front.
        """
        return self._is_byte_level and self.decode(self.encode("x", add_special_tokens=False)) == "x"

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self.backend.decoder)

    @cached_property
    def _chat_template(self) -> TemplateProcess:
        from blendserve.models.template_process import TemplateProcess

        if self.chat_template_source is None:
            raise ConfigError("the model has no chat template; use /v1/completions (LLM.generate) or an instruct model")
        return TemplateProcess(
            self.chat_template_source,
            self.special_tokens,
            tool_source=self.tool_template_source,
            date=self.template_date,
        )

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; encode it with `add_special_tokens=False`.

        Raises: ConfigError when the model has no template, RequestError when it does not take these messages.
        """
        conversation = Conversation(tuple(messages), add_generation_prompt=add_generation_prompt)
        (text,) = self._chat_template.render_each([conversation])
        if isinstance(text, RequestError):
            raise text
        return text

    def render_each(self, conversations: Sequence[Conversation]) -> list[str | RequestError]:
        """The prompts of many conversations, each or why the template gives none. Raises: ConfigError when the model
        has no template.
        """
        return self._chat_template.render_each(conversations)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file, empty where there is no file. Raises: ConfigError when it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not an object; download the model again")
    return value


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte. Source: GPT-2's `bytes_to_unicode`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_BY_CHAR = _byte_level_alphabet()

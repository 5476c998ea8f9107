"""Prompts and conversations of `LLM`'s callers -> token ids, read as their call says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from blendserve.dialect.chat_options import ChatOptions, take_chat_options
from blendserve.dialect.values import shown
from blendserve.errors import ConfigError, RequestError
from blendserve.models.chat_encoder import ChatEncoder
from blendserve.models.chat_formats import ChatFormats
from blendserve.models.tokenizer import Tokenizer
from blendserve.models.tool_formats.hermes import HERMES
from blendserve.offline.chats import NO_OPTIONS, encode_chats
from blendserve.offline.prompts import (
    NO_TOKENIZATION,
    Conversation,
    Encoded,
    Prompt,
    TokenizationOptions,
    encode_prompts,
    is_conversation,
    read_tokenization,
    truncated,
)
from blendserve.request import SamplingParams

CONTENT_FORMATS = ("auto", "string", "openai")
_MAX_TEMPLATES = 8


@dataclass(frozen=True, slots=True)
class Asked:
    """How the prompts of one call are read. `chat_template`: None for the model's own."""

    are_chats: bool = False
    tokenization: TokenizationOptions = NO_TOKENIZATION
    chat: ChatOptions = NO_OPTIONS
    chat_template: str | None = None


def asked_of_chat(
    *,
    chat_template: str | None,
    chat_template_content_format: str,
    tokenization_kwargs: Mapping[str, Any] | None,
    **options: Any,
) -> Asked:
    """The keywords of `LLM.chat`. Raises: ConfigError naming the one that is wrong."""
    if chat_template_content_format not in CONTENT_FORMATS:
        raise ConfigError(
            f"chat_template_content_format is {shown(chat_template_content_format)}; it must be one of "
            f"{', '.join(CONTENT_FORMATS)}"
        )
    if chat_template is not None and not isinstance(chat_template, str):
        raise ConfigError(f"chat_template is {shown(chat_template)}; it must be the text of a template")
    try:
        _, chat = take_chat_options(options)
    except RequestError as error:
        raise ConfigError(str(error)) from None
    return Asked(True, read_tokenization(tokenization_kwargs), chat, chat_template)


class PromptEncoder:
    """One tokenizer, and its chat templates: the model's own, and those that calls bring along."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._chats_of = lru_cache(maxsize=_MAX_TEMPLATES)(self._open_chats)

    def encode(
        self, prompts: Sequence[Prompt | Conversation], params: Iterable[SamplingParams], asked: Asked
    ) -> Iterator[tuple[Encoded, SamplingParams]]:
        """Text and token ids of every prompt, or why it has none, beside its parameters. Raises: ConfigError for a
        conversation where there is no chat template.
        """
        for encoded, sampling in zip(self._encode(prompts, asked), params, strict=True):
            yield truncated(encoded, sampling, asked.tokenization, self._max_model_len), sampling

    def _encode(self, prompts: Sequence[Prompt | Conversation], asked: Asked) -> list[Encoded]:
        is_chat = [asked.are_chats or is_conversation(prompt) for prompt in prompts]
        of_kind = [[prompt for prompt, kind in zip(prompts, is_chat, strict=True) if kind == one] for one in (0, 1)]
        chats = iter(self._encode_chats(of_kind[True], asked))
        others = iter(
            encode_prompts(
                of_kind[False],
                self._tokenizer,
                vocab_size=self._vocab_size,
                max_model_len=self._max_model_len,
                adds_special_tokens=asked.tokenization.add_special_tokens,
            )
        )
        return [next(chats) if is_one else next(others) for is_one in is_chat]

    def _encode_chats(self, chats: Sequence[Any], asked: Asked) -> list[Encoded]:
        if not chats:
            return []
        encoder, formats = self._chats_of(asked.chat_template)
        encoded = encode_chats(encoder, formats, chats, asked.chat, self._max_model_len)
        return [Encoded(text, token_ids) for text, token_ids in encoded]

    def _open_chats(self, template: str | None) -> tuple[ChatEncoder, ChatFormats]:
        tokenizer = self._tokenizer
        if template is not None:
            tokenizer = replace(tokenizer, chat_template_source=template, tool_template_source=None)
        formats = ChatFormats.of(tokenizer)
        if formats.tools is None and formats.renders_tools:  # answers are not read for calls here: any format will do
            formats = replace(formats, tools=HERMES)
        return ChatEncoder(tokenizer), formats

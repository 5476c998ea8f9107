"""Conversations of Python callers -> prompts, by the reader that batch lines have too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blendserve.dialect.chat_options import ChatOptions
from blendserve.dialect.messages import read_messages
from blendserve.dialect.tools import conversation_of
from blendserve.errors import RequestError
from blendserve.models.chat_encoder import ChatEncoder, EncodedChat
from blendserve.models.chat_formats import ChatFormats
from blendserve.models.conversation import Conversation

NO_OPTIONS = ChatOptions()


def encode_chats(
    encoder: ChatEncoder,
    formats: ChatFormats,
    chats: Sequence[Any],
    options: ChatOptions = NO_OPTIONS,
    max_tokens: int = 0,
) -> list[EncodedChat]:
    """The prompt of every conversation, or why there is none; `options` are for all of them.

    Raises: ConfigError when the model has no chat template.
    """
    read = [_read(formats, chat, options) for chat in chats]
    encoded = iter(encoder.encode_each([chat for chat in read if isinstance(chat, Conversation)], max_tokens))
    return [EncodedChat(None, chat) if isinstance(chat, RequestError) else next(encoded) for chat in read]


def _read(formats: ChatFormats, chat: Any, options: ChatOptions) -> Conversation | RequestError:
    try:
        return conversation_of(read_messages(chat), options, formats)
    except RequestError as error:
        return error

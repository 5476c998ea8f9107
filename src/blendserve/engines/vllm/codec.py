"""The codec of a model in vLLM: exact tokens for text; for conversations with pictures an estimate to plan by."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from blendserve.dialect.codec import ModelCodec
from blendserve.dialect.images import Picture
from blendserve.engines.vllm.cost import picture_tokens
from blendserve.errors import RequestError
from blendserve.models.chat_formats import ChatFormats
from blendserve.models.conversation import Conversation, Message, text_of_content
from blendserve.models.tokenizer import Tokenizer
from blendserve.request import StructuredOutputs, TokenIds


class VllmCodec(ModelCodec):
    """A picture stands at the beginning of its message, as many tokens as it is likely to take, equal for equal
    pictures. `max_model_len` bounds the estimate: whether such a prompt is too long, vLLM decides. `settles`: grammars
    say themselves where reasoning ends.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        max_model_len: int,
        formats: ChatFormats | None = None,
        *,
        obeys_control_tokens: bool = False,
        settles: bool = True,
    ) -> None:
        super().__init__(tokenizer, max_model_len, formats, obeys_control_tokens=obeys_control_tokens)
        self._config = config
        self._settles = settles
        self._mark = f"\n{secrets.token_hex(8)}\n"

    def encode(self, prompts: Sequence[str | Conversation]) -> list[TokenIds | RequestError]:
        """Raises: RequestError for a chat without a template."""
        plain = iter(super().encode([prompt for prompt in prompts if not _has_pictures(prompt)]))
        return [self._with_pictures(prompt) if _has_pictures(prompt) else next(plain) for prompt in prompts]

    def settled(self, structure: StructuredOutputs, prompt_token_ids: Any) -> StructuredOutputs:
        """As it is where vLLM itself waits for the end of the reasoning, or can begin no grammar inside an answer."""
        return super().settled(structure, prompt_token_ids) if self._settles else structure

    def _marked(self, prompt: Conversation) -> Conversation:
        messages = tuple(
            {**message, "content": self._mark * len(_pictures_of(message)) + text_of_content(message["content"])}
            for message in prompt.messages
        )
        return replace(prompt, messages=messages)

    def _with_pictures(self, prompt: str | Conversation) -> TokenIds | RequestError:
        """The rendered conversation cut at its marks, pictures between the pieces."""
        assert not isinstance(prompt, str)
        self._check_template()
        (text,) = self._tokenizer.render_each([self._marked(prompt)])
        if isinstance(text, RequestError):
            return text
        first, *others = self._tokenizer.encode_each(text.split(self._mark.strip("\n")), False, self._max_model_len)
        pictures = [picture for message in prompt.messages for picture in _pictures_of(message)]
        parts = [first]
        for picture, piece in zip(pictures, others, strict=False):  # a template may leave messages out
            parts += [_tokens_of(picture, picture_tokens(picture, self._config)), piece]
        whole: list[TokenIds] = []
        for part in parts:
            if isinstance(part, RequestError):
                return part
            whole.append(part)
        return np.concatenate(whole)[: self._max_model_len - 1].astype(np.int32)


def _has_pictures(prompt: str | Conversation) -> bool:
    return not isinstance(prompt, str) and any("pictures" in message for message in prompt.messages)


def _pictures_of(message: Message) -> list[Picture]:
    return [Picture.from_text(text) for text in message.get("pictures", "").split()]


def _tokens_of(picture: Picture, count: int) -> TokenIds:
    """Ids that no other picture has at its place, above any vocabulary."""
    first = int(picture.digest[:7], 16)
    return (np.arange(count, dtype=np.int64) + first + (1 << 30)).astype(np.int32)

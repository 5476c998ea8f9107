"""The `Codec` of a model whose tokenizer and chat template are at hand."""

from __future__ import annotations

import datetime
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from blendserve.dialect.urls import COMPLETIONS_URL
from blendserve.errors import RequestError
from blendserve.models.chat_encoder import ChatEncoder
from blendserve.models.chat_formats import AnswerParts, ChatFormats
from blendserve.models.conversation import Conversation
from blendserve.models.detokenize import marked_text_of, text_of
from blendserve.models.tokenizer import Tokenizer
from blendserve.models.tool_formats.format import Tool
from blendserve.request import SamplingParams, SequenceOutput, StructuredOutputs, TokenIds

_TAIL_TOKENS = 16
"""Of a prompt: enough to see whether it ends inside the reasoning."""


class ModelCodec:
    """Conversations go through the chat template; plain texts get what the model expects around them (BOS).

    `formats`: how the model marks reasoning and calls. None: answers are plain text. `obeys_control_tokens`: the texts
    of users may hold control tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_model_len: int = 0,
        formats: ChatFormats | None = None,
        *,
        obeys_control_tokens: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._formats = formats or ChatFormats()
        self._obeys_control_tokens = obeys_control_tokens
        self._chats = ChatEncoder(tokenizer, obeys_control_tokens=obeys_control_tokens)

    @property
    def marks_reasoning(self) -> bool:
        """Do answers hold reasoning that is taken out of them?"""
        return self._formats.reasoning is not None

    def encode(self, prompts: Sequence[str | Conversation]) -> list[TokenIds | RequestError]:
        """Encode in two calls, one per kind, each on all cores. Raises: RequestError for a chat without a template."""
        texts = {at: prompt for at, prompt in enumerate(prompts) if isinstance(prompt, str)}
        chats = {at: prompt for at, prompt in enumerate(prompts) if not isinstance(prompt, str)}
        outcomes: dict[int, TokenIds | RequestError] = {}
        if texts:
            encoded = self._tokenizer.encode_each([*texts.values()], True, self._max_model_len)
            outcomes |= zip(texts, encoded, strict=True)
        if chats:
            outcomes |= zip(chats, self._encode_chats([*chats.values()]), strict=True)
        return [outcomes[at] for at in range(len(prompts))]

    def _encode_chats(self, chats: Sequence[Conversation]) -> list[TokenIds | RequestError]:
        self._check_template()
        return [chat.token_ids for chat in self._chats.encode_each(chats, self._max_model_len)]

    def _check_template(self) -> None:
        if not self._tokenizer.has_chat_template:
            raise RequestError(
                f"the model has no chat template; send the line to {COMPLETIONS_URL}, choose a model made for chat, or "
                "give a template with --chat-template",
                code="unsupported_parameter",
                param="messages",
            )

    def use_date(self, date: str) -> None:
        self._tokenizer = replace(self._tokenizer, template_date=datetime.date.fromisoformat(date))
        self._chats = ChatEncoder(self._tokenizer, obeys_control_tokens=self._obeys_control_tokens)

    def settled(self, structure: StructuredOutputs, prompt_token_ids: Sequence[int] | TokenIds) -> StructuredOutputs:
        return self._formats.settled(structure, self._tail_of(prompt_token_ids))

    def _tail_of(self, prompt_token_ids: Sequence[int] | TokenIds) -> str:
        """The end of a prompt."""
        tail = [int(token_id) for token_id in prompt_token_ids[-_TAIL_TOKENS:]]
        return self._tokenizer.decode(tail, skip_special_tokens=False)

    def parts_of(
        self,
        prompt_token_ids: Sequence[int] | TokenIds,
        output: SequenceOutput,
        sampling: SamplingParams,
        tools: Sequence[Tool],
        *,
        may_call: bool,
    ) -> tuple[AnswerParts, int]:
        formats = self._formats
        if formats.reasoning is None and not may_call:
            return AnswerParts(self.text_of(output, sampling)), 0
        kept = frozenset(formats.special_ids.values())
        is_open = formats.reasoning is not None and formats.reasoning.is_open(self._tail_of(prompt_token_ids))
        text = marked_text_of(self._tokenizer, output, sampling, kept) if kept else self.text_of(output, sampling)
        parts = formats.take_apart(text, tools, is_open=is_open, may_call=may_call)
        return parts, self._num_tokens(output.token_ids, parts.reasoning_end, kept)

    def _num_tokens(self, token_ids: TokenIds, num_characters: int, kept: frozenset[int]) -> int:
        """The least tokens whose text has so many characters."""
        if not num_characters:
            return 0
        decode = self._tokenizer.decode_keeping
        return bisect_left(range(len(token_ids)), num_characters, key=lambda n: len(decode(token_ids[:n], kept)))

    def text_of(self, output: SequenceOutput, sampling: SamplingParams) -> str:
        return text_of(
            self._tokenizer,
            output.token_ids,
            output.finish_reason,
            output.stop_reason,
            sampling,
            has_stop_token=output.has_stop_token,
        )

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

"""The `Codec` of a model whose tokenizer and chat template are at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blendserve.dialect.prompts import Message
from blendserve.dialect.urls import COMPLETIONS_URL
from blendserve.errors import RequestError
from blendserve.models.detokenize import text_of
from blendserve.models.tokenizer import Tokenizer
from blendserve.request import SequenceOutput, TokenIds


class ModelCodec:
    """Conversations go through the chat template; plain texts get what the model expects around them (BOS)."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int = 0) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len

    def encode(self, prompts: Sequence[str | tuple[Message, ...]]) -> list[TokenIds | RequestError]:
        """Encode in two calls, one per kind, each on all cores. Raises: RequestError for a chat without a template."""
        outcomes: list[TokenIds | RequestError | None] = [None] * len(prompts)
        texts = {at: prompt for at, prompt in enumerate(prompts) if isinstance(prompt, str)}
        self._encode(texts, outcomes, add_special_tokens=True)
        chats = {at: prompt for at, prompt in enumerate(prompts) if not isinstance(prompt, str)}
        rendered = dict(zip(chats, self._render([*chats.values()]), strict=True)) if chats else {}
        for at, text in rendered.items():
            outcomes[at] = text if isinstance(text, RequestError) else None
        texts = {at: text for at, text in rendered.items() if isinstance(text, str)}
        self._encode(texts, outcomes, add_special_tokens=False)
        return [outcome for outcome in outcomes if outcome is not None]

    def _render(self, chats: Sequence[tuple[Message, ...]]) -> list[str | RequestError]:
        if not self._tokenizer.has_chat_template:
            raise RequestError(
                f"the model has no chat template; ask {COMPLETIONS_URL}, or choose a model made for chat",
                code="unsupported_parameter",
                param="messages",
            )
        return self._tokenizer.render_each(chats)

    def _encode(
        self, texts: Mapping[int, str], outcomes: list[TokenIds | RequestError | None], *, add_special_tokens: bool
    ) -> None:
        if texts:
            encoded = self._tokenizer.encode_each([*texts.values()], add_special_tokens, self._max_model_len)
            for at, outcome in zip(texts, encoded, strict=True):
                outcomes[at] = outcome

    def text_of(self, output: SequenceOutput) -> str:
        return text_of(
            self._tokenizer,
            output.token_ids,
            output.finish_reason,
            output.stop_reason,
            has_stop_token=output.has_stop_token,
        )

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

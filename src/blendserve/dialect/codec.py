"""The `Codec` of a model whose tokenizer and chat template are at hand."""

from __future__ import annotations

from collections.abc import Sequence

from blendserve.dialect.schema import COMPLETIONS_URL, Message
from blendserve.errors import RequestError
from blendserve.models.detokenize import text_of
from blendserve.models.tokenizer import Tokenizer
from blendserve.request import SequenceOutput, TokenIds


class ModelCodec:
    """Conversations go through the chat template; plain texts get what the model expects around them (BOS)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, prompts: Sequence[str | tuple[Message, ...]]) -> list[TokenIds]:
        """Encode in two calls, one per kind, each on all cores. Raises: RequestError when one cannot be encoded."""
        encoded: list[TokenIds | None] = [None] * len(prompts)
        chats = [at for at, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        texts = [at for at, prompt in enumerate(prompts) if isinstance(prompt, str)]
        if chats and not self._tokenizer.has_chat_template:
            raise RequestError(
                f"the model has no chat template; ask {COMPLETIONS_URL}, or choose a model made for chat",
                code="unsupported_parameter",
                param="messages",
            )
        rendered = [self._tokenizer.apply_chat_template(prompts[at]) for at in chats]  # type: ignore[arg-type]
        plain = [prompt for prompt in prompts if isinstance(prompt, str)]
        for positions, of_kind, has_special in ((chats, rendered, False), (texts, plain, True)):
            if positions:
                for at, token_ids in zip(positions, self._tokenizer.encode_batch(of_kind, has_special), strict=True):
                    encoded[at] = token_ids
        return [token_ids for token_ids in encoded if token_ids is not None]

    def text_of(self, output: SequenceOutput) -> str:
        return text_of(self._tokenizer, output.token_ids, output.finish_reason, output.stop_reason)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

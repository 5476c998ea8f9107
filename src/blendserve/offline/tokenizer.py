"""The model's tokenizer with the methods that callers of transformers' tokenizers know, for `LLM.get_tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blendserve.errors import RequestError
from blendserve.models.tokenizer import Tokenizer
from blendserve.offline.encoder import PromptEncoder, asked_of_chat
from blendserve.request import SamplingParams


class LLMTokenizer:
    """Text to token ids and back. What is not here, `backend_tokenizer` (of the package `tokenizers`) has."""

    def __init__(self, tokenizer: Tokenizer, encoder: PromptEncoder) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self.backend_tokenizer = tokenizer.backend
        self.chat_template = tokenizer.chat_template_source

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, of one text or of each."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        encoded = [ids.tolist() for ids in self._tokenizer.encode_batch(list(text), add_special_tokens)]
        return {"input_ids": encoded, "attention_mask": [[1] * len(ids) for ids in encoded]}

    @property
    def vocab_size(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=False))

    @property
    def eos_token(self) -> str | None:
        return self._tokenizer.special_tokens.get("eos_token")

    @property
    def bos_token(self) -> str | None:
        return self._tokenizer.special_tokens.get("bos_token")

    @property
    def pad_token(self) -> str | None:
        return self._tokenizer.special_tokens.get("pad_token")

    @property
    def unk_token(self) -> str | None:
        return self._tokenizer.special_tokens.get("unk_token")

    @property
    def eos_token_id(self) -> int | None:
        ids = self._tokenizer.eos_token_ids
        return self._id_of(self.eos_token) if self.eos_token or not ids else ids[0]

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of(self.bos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of(self.pad_token)

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(self._tokenizer.special_token_ids)

    def get_vocab(self) -> dict[str, int]:
        """Token ids by token."""
        return dict(self.backend_tokenizer.get_vocab())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens).tolist()
        return ids

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        return self._tokenizer.decode([token_ids] if isinstance(token_ids, int) else token_ids, skip_special_tokens)

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """Text of each list of token ids."""
        return [self.decode(token_ids, skip_special_tokens) for token_ids in sequences]

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text, as the vocabulary writes them."""
        return list(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).tokens)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or of each; None for one that there is not."""
        return self._id_of(tokens) if isinstance(tokens, str) else [self._id_of(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The token of an id, or of each; None for one that there is not."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(token_id) for token_id in ids]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> Any:
        """The prompt of a conversation: its token ids, or with `tokenize=False` its text. `variables` are what the
        template is told beside the messages.

        Raises: ConfigError when the model has no chat template, or when an option is wrong; RequestError when the
        template does not take these messages.
        """
        asked = asked_of_chat(
            chat_template=None,
            chat_template_content_format="auto",
            tokenization_kwargs=None,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=variables or None,
        )
        ((encoded, _),) = self._encoder.encode([conversation], [SamplingParams()], asked)
        if isinstance(encoded.token_ids, RequestError):
            raise encoded.token_ids
        return encoded.token_ids.tolist() if tokenize else encoded.text

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.backend_tokenizer.token_to_id(token)

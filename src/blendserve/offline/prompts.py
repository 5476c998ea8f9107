"""The shapes in which vLLM's `LLM` takes prompts -> one kind of prompt each, or why it is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat, zip_longest
from typing import Any, NamedTuple

import numpy as np

from blendserve.dialect.parameters import kept_tokens
from blendserve.dialect.values import shown
from blendserve.errors import ConfigError, RequestError
from blendserve.models.tokenizer import Tokenizer
from blendserve.request import SamplingParams, TokenIds

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`."""
Message = Mapping[str, Any]
Conversation = Sequence[Message]

_TOKENIZATION = ("add_special_tokens", "truncate_prompt_tokens")
_NEEDS_EYES = ("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs")
_OTHER_KINDS = {
    "prompt_embeds": "embeddings of a prompt",
    "encoder_prompt": "a prompt for an encoder",
    "decoder_prompt": "a prompt for a decoder",
}
_WANTED = 'a text, a list of token ids, {"prompt": "..."} or {"prompt_token_ids": [...]}'


class Encoded(NamedTuple):
    """A prompt as the model reads it. `text` is None where it was given as token ids alone."""

    text: str | None
    token_ids: TokenIds | RequestError


class TokenizationOptions(NamedTuple):
    """vLLM's `tokenization_kwargs`."""

    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None


NO_TOKENIZATION = TokenizationOptions()


def read_tokenization(given: Mapping[str, Any] | None) -> TokenizationOptions:
    """Raises: ConfigError for an option that is not known."""
    for name in given or {}:
        if name not in _TOKENIZATION:
            raise ConfigError(f"tokenization_kwargs has {name!r}; it may have {' and '.join(_TOKENIZATION)}")
    return TokenizationOptions(**{name: value for name, value in (given or {}).items() if value is not None})


def listed_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or a list of them as a list."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if len(prompts) and all(isinstance(prompt, int | np.integer) for prompt in prompts):
        return [prompts]  # one prompt, given as its token ids
    return list(prompts)


def listed_conversations(messages: Any) -> list[Conversation]:
    """One message, one conversation or a list of them as a list of conversations."""
    if isinstance(messages, Mapping):
        return [[messages]]
    if len(messages) and all(isinstance(message, Mapping) for message in messages):
        return [messages]
    return list(messages)


def is_conversation(prompt: Any) -> bool:
    """Is it a list of messages?"""
    if isinstance(prompt, str | Mapping) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def are_listed(prompts: Any) -> bool:
    """Are the prompts all there, and not made one by one?"""
    return isinstance(prompts, str | Sequence | Mapping | np.ndarray)


def encode_prompts(
    prompts: Sequence[Any], tokenizer: Tokenizer, *, vocab_size: int, max_model_len: int, adds_special_tokens: bool
) -> list[Encoded]:
    """Every prompt that is no conversation, encoded, or why it cannot be."""
    read = [_read(prompt) for prompt in prompts]
    texts = [text for text, token_ids in read if text is not None and token_ids is None]
    encoded = iter(tokenizer.encode_each(texts, adds_special_tokens, max_model_len))
    found = []
    for text, token_ids in read:
        if token_ids is None:
            found.append(Encoded(text, next(encoded)))
        elif isinstance(token_ids, RequestError):
            found.append(Encoded(text, token_ids))
        else:
            found.append(Encoded(text, _checked_ids(token_ids, vocab_size)))
    return found


def truncated(encoded: Encoded, params: SamplingParams, options: TokenizationOptions, max_model_len: int) -> Encoded:
    """The end of a prompt where only that is wanted; `params` come before `options`."""
    asked = params.truncate_prompt_tokens
    num_kept = options.truncate_prompt_tokens if asked is None else asked
    if num_kept is None or isinstance(encoded.token_ids, RequestError) or type(num_kept) is not int or num_kept < -1:
        return encoded  # a number that is none is refused with the other parameters
    kept = kept_tokens(encoded.token_ids, num_kept, params.max_tokens, max_model_len)
    return encoded._replace(token_ids=kept)


def _read(prompt: Any) -> tuple[str | None, Any]:
    """Text and token ids (None: to be encoded; an error: it is no prompt)."""
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, Mapping):
        return None, prompt
    if "role" in prompt:
        return None, _error("is a message of a conversation; give it to LLM.chat", "invalid_type")
    for name, what in _OTHER_KINDS.items():
        if prompt.get(name) is not None:
            return None, _error(f"has {name}, {what}, which this engine does not take", "unsupported_parameter")
    for name in _NEEDS_EYES:
        if prompt.get(name):
            return None, _error(f"has {name}; this engine reads text only", "unsupported_parameter")
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        return None, _error(f"is {shown(text)} in 'prompt', which must be a text", "invalid_type")
    if text is None and token_ids is None:
        return None, _error(f"is {shown(prompt)}; it must be {_WANTED}", "invalid_type")
    return text, token_ids


def _error(problem: str, code: str) -> RequestError:
    return RequestError(f"the prompt {problem}", code=code, param="prompt")


def _checked_ids(prompt: Any, vocab_size: int) -> TokenIds | RequestError:
    """A prompt given as token ids; an error where it is anything else."""
    try:
        token_ids = np.asarray(prompt)
    except ValueError:  # lists of different lengths
        token_ids = np.zeros((0, 0))
    if token_ids.ndim != 1 or (token_ids.size and token_ids.dtype.kind not in "iu"):
        return _error(f"is {shown(prompt)}; it must be {_WANTED}", "invalid_type")
    if token_ids.size and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
        return _error(
            f"holds token ids from {token_ids.min()} to {token_ids.max()}; the model has 0 to {vocab_size - 1}",
            "invalid_token_id",
        )
    return token_ids.astype(np.int32)


def listed_params(params: SamplingParams | Iterable[SamplingParams], count: int) -> list[SamplingParams]:
    """One set of parameters per prompt. Raises: ConfigError where their number differs from that of the prompts."""
    if isinstance(params, SamplingParams):
        return [params] * count
    listed = list(params)
    if len(listed) != count:
        raise ConfigError(f"{len(listed)} sampling parameters for {count} prompts; give one for all or one per prompt")
    return listed


def refuse_lora(lora_request: Any) -> None:
    """Raises: ConfigError where an adapter is asked for."""
    given = lora_request if isinstance(lora_request, list | tuple) else [lora_request]
    if any(one is not None for one in given):
        raise ConfigError(
            "lora_request is given, and this engine has no LoRA adapters; use vLLM: VllmSettings(adapters=...), "
            "or --engine vllm --lora NAME=PATH"
        )


def paired(
    prompts: Iterable[Any], params: SamplingParams | Iterable[SamplingParams]
) -> Iterator[tuple[Any, SamplingParams]]:
    """Prompts that are made one by one, each with its parameters. Raises: ConfigError where their numbers differ."""
    if isinstance(params, SamplingParams):
        yield from zip(prompts, repeat(params))
        return
    missing = object()
    for number, (prompt, sampling) in enumerate(zip_longest(prompts, params, fillvalue=missing)):
        if prompt is missing or sampling is missing:
            few, more = ("prompts", "sampling parameters") if prompt is missing else ("sampling parameters", "prompts")
            raise ConfigError(f"there are {number} {few} and more {more}; give one for all prompts, or one per prompt")
        yield prompt, sampling  # type: ignore[misc]

"""What a model reads, as a body gives it: OpenAI's four forms of `prompt` and `input`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blendserve.dialect.values import read_token_ids, reject
from blendserve.errors import RequestError
from blendserve.models.conversation import Conversation

Prompt = str | tuple[int, ...] | Conversation

MAX_PROMPTS = 2048


def read_prompts(name: str, body: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """OpenAI's four forms: a string, a list of strings, a list of token ids, a list of lists of token ids."""
    prompt = body.get(name)
    if prompt is None:
        raise RequestError(f"{name} is missing", code="missing_required_parameter", param=name)
    if isinstance(prompt, str):
        return (_check_not_empty(name, prompt),)
    if not isinstance(prompt, list) or not prompt:
        reject(name, prompt, "a string or a list that is not empty", code="invalid_type")
    if type(prompt[0]) in (int, float):
        return (read_token_ids(name, prompt),)
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(
            f"{name} holds {len(prompt)} prompts; at most {MAX_PROMPTS}", code="invalid_value", param=name
        )
    return tuple(_read_one_prompt(f"{name}[{index}]", one) for index, one in enumerate(prompt))


def _read_one_prompt(name: str, prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return _check_not_empty(name, prompt)
    if not isinstance(prompt, list):
        reject(name, prompt, "a string or a list of token ids", code="invalid_type")
    return _check_not_empty(name, read_token_ids(name, prompt))


def _check_not_empty(name: str, prompt: str | tuple[int, ...]) -> Prompt:
    if not prompt:
        raise RequestError(f"{name} is empty; it needs at least one token", code="invalid_value", param=name)
    return prompt

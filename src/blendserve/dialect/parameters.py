"""The body of one request -> `SamplingParams`: types, ranges, and a row for whatever would change the answer unnoticed.

Two tables hold the rules: `readers` (honoured) and `unsupported` (accepted only with values that leave the answer as it
is). A name in neither is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

from blendserve.dialect.readers import CHAT_READERS, COMPLETION_READERS, PYTHON_READERS
from blendserve.dialect.unsupported import CHAT_UNSUPPORTED, COMPLETION_UNSUPPORTED, IGNORED_FIELDS, Unsupported
from blendserve.dialect.values import Reader, reject, shown
from blendserve.errors import RequestError
from blendserve.request import SamplingParams, TokenIds

Tokens = TypeVar("Tokens", bound=Sequence[int] | TokenIds)

_PROMPT_FIELDS = frozenset(("model", "messages", "prompt"))
BODY_FIELDS = frozenset(
    (*CHAT_READERS, *COMPLETION_READERS, *CHAT_UNSUPPORTED, *COMPLETION_UNSUPPORTED, *_PROMPT_FIELDS)
)
"""Every name a body may carry: beside the body they are misplaced, and would be lost."""


def read_chat_parameters(body: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters of a chat body; `messages` and `model` are the caller's.

    Raises: RequestError naming the first parameter that is unknown, unsupported, of the wrong type or out of range.
    """
    values = _read_all(body, "messages", CHAT_READERS, CHAT_UNSUPPORTED)
    num_top = values.pop("top_logprobs", None)
    if values.pop("logprobs", False):
        values["logprobs"] = num_top or 0
    elif num_top:
        raise RequestError(
            f'top_logprobs is {num_top}, and logprobs is not true: add "logprobs": true, or remove top_logprobs',
            code="invalid_value",
            param="top_logprobs",
        )
    return _build(values, default_max_tokens=None)


def read_completion_parameters(body: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters of a completions body; `prompt` and `model` are the caller's. Raises: as for chat."""
    values = _read_all(body, "prompt", COMPLETION_READERS, COMPLETION_UNSUPPORTED)
    if values.pop("echo", False) and values.get("logprobs") is not None:
        values.setdefault("prompt_logprobs", values["logprobs"])
    return _build(values, default_max_tokens=16)


def check_params(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """Hold parameters that came from Python against the rules of a request body; `structured_outputs` is left as it is.

    Returns: them as a body would give them (lists as tuples, one stop string as a tuple of one). Raises: RequestError.
    """
    given = {
        field.name: _as_json(getattr(params, field.name))
        for field in fields(SamplingParams)
        if field.name != "structured_outputs"
    }
    values = {name: PYTHON_READERS[name](name, value) for name, value in given.items() if value is not None}
    checked = replace(_build(values, default_max_tokens=None), structured_outputs=params.structured_outputs)
    check_vocabulary(checked, vocab_size)
    return checked


def _as_json(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(_as_json(key)): _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, tuple | list) else value


def kept_tokens(token_ids: Tokens, num_kept: int | None, max_tokens: int | None, max_model_len: int) -> Tokens:
    """The end of a prompt that `truncate_prompt_tokens` keeps, all where it is None. -1 keeps what the context holds
    beside `max_tokens` of answer; `max_model_len=0`: the context is not known.
    """
    if num_kept == -1:
        num_kept = max(1, max_model_len - (max_tokens or 1)) if max_model_len else None
    return token_ids if num_kept is None else token_ids[-num_kept:]  # type: ignore[return-value]


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raises: RequestError where parameters name tokens that the model does not have."""
    check_token_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    check_token_ids("logit_bias", tuple(params.logit_bias), vocab_size)
    check_token_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)


def check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises: RequestError naming the largest of `token_ids` where it is none of the vocabulary."""
    if token_ids and max(token_ids) >= vocab_size:
        raise RequestError(
            f"{name} names the token {max(token_ids)}; the model has {vocab_size} tokens, 0 to {vocab_size - 1}",
            code="invalid_value",
            param=name,
        )


def _read_all(
    body: Mapping[str, Any],
    prompt_field: str,
    readers: Mapping[str, Reader],
    unsupported: Mapping[str, Unsupported],
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in body.items():
        if name in readers:
            if value is not None:
                values[name] = readers[name](name, value)
        elif name in unsupported:
            if value is not None:
                unsupported[name].check(name, value, body)
        elif name not in IGNORED_FIELDS and name not in ("model", prompt_field):
            raise RequestError(
                f"unknown parameter {shown(name)}: remove it, or correct its spelling{_meant(name, readers)}",
                code="unknown_parameter",
                param=name[:100],
            )
    return values


def _meant(name: str, known: Mapping[str, Reader]) -> str:
    close = difflib.get_close_matches(name[:100], known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _build(values: dict[str, Any], *, default_max_tokens: int | None) -> SamplingParams:
    given = values.get("max_tokens")
    max_tokens = values.pop("max_completion_tokens", given)
    if given is not None and given != max_tokens:
        raise RequestError(
            f"max_tokens is {given} and max_completion_tokens is {max_tokens}; give one of them",
            code="invalid_value",
            param="max_completion_tokens",
        )
    values["max_tokens"] = default_max_tokens if max_tokens is None else max_tokens
    if max_tokens is not None and values.get("min_tokens", 0) > max_tokens:
        reject("min_tokens", values["min_tokens"], f"at most max_tokens, {max_tokens}")
    return SamplingParams(**values)

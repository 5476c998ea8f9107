"""The body of one request -> `SamplingParams`: types, ranges, and a row for whatever would change the answer unnoticed.

Two tables hold the rules: `_READERS` (honoured) and `_NEUTRAL` (accepted only with values that leave the answer as
it is). A name in neither is an error. `null` means "not given", as with OpenAI.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn, TypeVar

import numpy as np

from blendserve.errors import RequestError
from blendserve.request import SamplingParams, TokenIds

MAX_INT32 = 2**31 - 1
MAX_STOP_STRINGS = 64
MAX_BAD_WORDS = 1000
MAX_CHOICES = 128
MAX_LISTED_TOKENS = 1 << 14
MAX_LOGPROBS = 20
SMALLEST_TOP_P = 1e-6
"""OpenAI takes top_p = 0 and always keeps the best token; so does a nucleus this small."""
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 0.01, 1e30

Reader = Callable[[str, Any], Any]
Tokens = TypeVar("Tokens", bound=Sequence[int] | TokenIds)


def shown(value: object) -> str:
    """A value as an error message quotes it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a very large number"
    return text if len(text) <= 60 else text[:57] + "..."


def reject(name: str, value: object, wanted: str, *, code: str = "invalid_value") -> NoReturn:
    """Raise the error that names parameter, value and what is allowed."""
    raise RequestError(f"{name} is {shown(value)}; it must be {wanted}", code=code, param=name)


def read_boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        reject(name, value, "true or false", code="invalid_type")
    return value


def integer_between(lowest: int, highest: int) -> Reader:
    """A reader of integers in [lowest, highest]. 6.0 counts as 6; true and false are no integers."""

    def read(name: str, value: Any) -> int:
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int:
            reject(name, value, "an integer", code="invalid_type")
        if not lowest <= value <= highest:
            reject(name, value, f"between {lowest} and {highest}")
        return value

    return read


def number_between(lowest: float, highest: float) -> Reader:
    """A reader of finite numbers in [lowest, highest]."""

    def read(name: str, value: Any) -> float:
        if type(value) is not float and type(value) is not int:
            reject(name, value, "a number", code="invalid_type")
        if not lowest <= value <= highest:
            reject(name, value, f"between {lowest:g} and {highest:g}")
        return float(value)

    return read


_read_top_p = number_between(0.0, 1.0)
_read_token_id = integer_between(0, MAX_INT32)


def read_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """A list of token ids. Raises: RequestError for anything that is no list of integers in [0, 2^31)."""
    if not isinstance(value, list):
        reject(name, value, "a list of token ids", code="invalid_type")
    if all(type(token_id) is int and 0 <= token_id <= MAX_INT32 for token_id in value):
        return tuple(value)
    return tuple(_read_token_id(name, token_id) for token_id in value)


def _read_listed_tokens(name: str, value: Any) -> tuple[int, ...]:
    token_ids = tuple(dict.fromkeys(read_token_ids(name, value)))
    if len(token_ids) > MAX_LISTED_TOKENS:
        _reject_long(name, len(token_ids))
    return token_ids


def _reject_long(name: str, num_tokens: int) -> NoReturn:
    raise RequestError(
        f"{name} names {num_tokens} tokens; at most {MAX_LISTED_TOKENS}", code="invalid_value", param=name
    )


def _read_allowed_tokens(name: str, value: Any) -> tuple[int, ...]:
    token_ids = _read_listed_tokens(name, value)
    if not token_ids:
        reject(name, value, "a list of at least one token id")
    return token_ids


def _read_temperature(name: str, value: Any) -> float:
    """Any number from 0 up. As in vLLM, what is above 0 counts as at least 0.01: the smallest would divide by zero."""
    if type(value) is not float and type(value) is not int:
        reject(name, value, "a number", code="invalid_type")
    if not 0 <= value <= LARGEST_TEMPERATURE:
        reject(name, value, "finite, and 0 or more")
    return max(float(value), SMALLEST_TEMPERATURE) if value else 0.0


def _read_truncation(name: str, value: Any) -> int:
    num_tokens: int = integer_between(-1, MAX_INT32)(name, value)
    if num_tokens == 0:
        reject(name, value, "the number of tokens to keep, or -1 for as many as the context holds")
    return num_tokens


def _read_completion_logprobs(name: str, value: Any) -> int | None:
    """A number of alternatives. As in vLLM, true is 1; false asks for none."""
    if isinstance(value, bool):
        return 1 if value else None
    number: int = integer_between(0, MAX_LOGPROBS)(name, value)
    return number


def _read_nucleus(name: str, value: Any) -> float:
    return max(float(_read_top_p(name, value)), SMALLEST_TOP_P)


def _read_top_k(name: str, value: Any) -> int:
    return max(int(integer_between(-1, MAX_INT32)(name, value)), 0)


def _read_repetition_penalty(name: str, value: Any) -> float:
    penalty: float = number_between(0.0, 100.0)(name, value)
    if penalty == 0.0:
        reject(name, value, "above 0")
    return penalty


def _read_stop(name: str, value: Any) -> tuple[str, ...]:
    return _read_strings(name, [value] if isinstance(value, str) else value, "a string or a list of strings")


def _read_bad_words(name: str, value: Any) -> tuple[str, ...]:
    return _read_strings(name, value, "a list of strings", MAX_BAD_WORDS)


def _read_strings(name: str, value: Any, wanted: str, most: int = MAX_STOP_STRINGS) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(string, str) for string in value):
        reject(name, value, wanted, code="invalid_type")
    if len(value) > most:
        raise RequestError(f"{name} has {len(value)} strings; at most {most}", code="invalid_value", param=name)
    if "" in value:
        reject(name, value, "without empty strings")
    return tuple(dict.fromkeys(value))


def _read_logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        reject(name, value, "an object from token ids to numbers", code="invalid_type")
    if len(value) > MAX_LISTED_TOKENS:
        _reject_long(name, len(value))
    bias: dict[int, float] = {}
    for key, amount in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_INT32):
            reject(name, key, "an object whose keys are token ids")
        if int(key) in bias:
            reject(name, key, "an object that names each token id once")
        bias[int(key)] = _read_bias(f"{name}.{key}", amount)
    return bias


def _read_bias(name: str, value: Any) -> float:
    """A number; as in vLLM, one beyond the range counts as the end of it."""
    if type(value) is not float and type(value) is not int:
        reject(name, value, "a number", code="invalid_type")
    if value != value:
        reject(name, value, "a number from -100 to 100")
    return float(min(max(value, -100), 100))


_READERS: Mapping[str, Reader] = {
    "max_tokens": integer_between(0, MAX_INT32),
    "max_completion_tokens": integer_between(0, MAX_INT32),
    "min_tokens": integer_between(0, MAX_INT32),
    "temperature": _read_temperature,
    "top_p": _read_nucleus,
    "top_k": _read_top_k,
    "min_p": number_between(0.0, 1.0),
    "seed": integer_between(-(2**63), 2**63 - 1),
    "stop": _read_stop,
    "stop_token_ids": _read_listed_tokens,
    "ignore_eos": read_boolean,
    "include_stop_str_in_output": read_boolean,
    "skip_special_tokens": read_boolean,
    "spaces_between_special_tokens": read_boolean,
    "bad_words": _read_bad_words,
    "allowed_token_ids": _read_allowed_tokens,
    "truncate_prompt_tokens": _read_truncation,
    "n": integer_between(1, MAX_CHOICES),
    "logit_bias": _read_logit_bias,
    "presence_penalty": number_between(-2.0, 2.0),
    "frequency_penalty": number_between(-2.0, 2.0),
    "repetition_penalty": _read_repetition_penalty,
    "prompt_logprobs": integer_between(0, MAX_LOGPROBS),
}
_CHAT_READERS: Mapping[str, Reader] = {
    **_READERS,
    "logprobs": read_boolean,
    "top_logprobs": integer_between(0, MAX_LOGPROBS),
}
_COMPLETION_READERS: Mapping[str, Reader] = {**_READERS, "logprobs": _read_completion_logprobs, "echo": read_boolean}
_PYTHON_READERS: Mapping[str, Reader] = {**_COMPLETION_READERS, "detokenize": read_boolean}

IGNORED_FIELDS = frozenset(
    (
        *("user", "metadata", "store", "safety_identifier", "service_tier", "request_id", "stream_options"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "cache_salt"),
        *("priority", "kv_transfer_params", "provider", "timeout", "extra_headers", "extra_query"),
    )
)
"""Bookkeeping of the caller, and what tells a client or a server how to do its work: any value, no effect on the
answer.
"""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "stream": (False,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "detokenize": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "safe_prompt": (False,),
    "thinking_token_budget": (),
    "grammar": ("",),
    "n_predict": (),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "dry_multiplier": (0, 0.0),
}
_CHAT_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **_NEUTRAL,
    "echo": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
    "chat_template": (),
}
_COMPLETION_NEUTRAL: Mapping[str, tuple[object, ...]] = {**_NEUTRAL, "suffix": ("",), "add_special_tokens": (True,)}
"""Parameters taken only with these values (or null), which leave the answer as it is."""

_PROMPT_FIELDS = frozenset(("model", "messages", "prompt"))
BODY_FIELDS = frozenset((*_CHAT_READERS, *_COMPLETION_READERS, *_CHAT_NEUTRAL, *_COMPLETION_NEUTRAL, *_PROMPT_FIELDS))
"""Every name a body may carry: beside the body they are misplaced, and would be lost."""


def read_chat_parameters(body: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters of a chat body; `messages` and `model` are the caller's.

    Raises: RequestError naming the first parameter that is unknown, unsupported, of the wrong type or out of range.
    """
    values = _read_all(body, "messages", _CHAT_READERS, _CHAT_NEUTRAL)
    num_top = values.pop("top_logprobs", None)
    if values.pop("logprobs", False):
        values["logprobs"] = num_top or 0
    elif num_top:
        raise RequestError("top_logprobs needs logprobs: true", code="invalid_value", param="top_logprobs")
    return _build(values, default_max_tokens=None)


def read_completion_parameters(body: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters of a completions body; `prompt` and `model` are the caller's. Raises: as for chat."""
    values = _read_all(body, "prompt", _COMPLETION_READERS, _COMPLETION_NEUTRAL)
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
    values = {name: _PYTHON_READERS[name](name, value) for name, value in given.items() if value is not None}
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
        reject(name, max(token_ids), f"made of token ids below {vocab_size}, the size of the vocabulary")


def _read_all(
    body: Mapping[str, Any], prompt_field: str, readers: Mapping[str, Reader], neutral: Mapping[str, tuple[object, ...]]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in body.items():
        if name in readers:
            if value is not None:
                values[name] = readers[name](name, value)
        elif name in neutral:
            if value is not None and not _is_one_of(value, (*neutral[name], *_same_as_absent(name, body))):
                _reject_unsupported(name, value, neutral[name])
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


def _same_as_absent(name: str, body: Mapping[str, Any]) -> tuple[object, ...]:
    """The best n of n answers are all of them."""
    return (body["n"],) if name == "best_of" and body.get("n") is not None else ()


def _is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    return any(type(value) is type(other) and value == other for other in allowed)


def _reject_unsupported(name: str, value: object, allowed: tuple[object, ...]) -> NoReturn:
    if name == "stream":
        raise RequestError(
            f"stream is {shown(value)}; a batch file is answered by whole responses: remove it, or set it to false",
            code="unsupported_parameter",
            param=name,
        )
    choices = " or ".join(["absent", *(json.dumps(other) for other in allowed)])
    raise RequestError(
        f"{name} = {shown(value)} is not supported and would change the answer; it must be {choices}",
        code="unsupported_parameter",
        param=name,
    )


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

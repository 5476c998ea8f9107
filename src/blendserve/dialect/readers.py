"""The parameters that shape an answer, each with the reader of its value. `null` means "not given", as with OpenAI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from blendserve.dialect.values import (
    MAX_INT32,
    Reader,
    integer_between,
    number_between,
    read_boolean,
    read_token_ids,
    reject,
    shown,
)
from blendserve.errors import RequestError

MAX_STOP_STRINGS = 64
MAX_BAD_WORDS = 1000
MAX_CHOICES = 128
MAX_LISTED_TOKENS = 1 << 14
MAX_LOGPROBS = 20
SMALLEST_TOP_P = 1e-6
"""OpenAI takes top_p = 0 and always keeps the best token; so does a nucleus this small."""
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 0.01, 1e30

_read_top_p = number_between(0.0, 1.0)


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
        reject(name, value, "a list of strings of which none is empty")
    return tuple(dict.fromkeys(value))


def _read_logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        reject(name, value, "an object from token ids to numbers", code="invalid_type")
    if len(value) > MAX_LISTED_TOKENS:
        _reject_long(name, len(value))
    bias: dict[int, float] = {}
    for key, amount in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_INT32):
            raise _key_error(name, key, 'write token ids, such as "42"')
        if int(key) in bias:
            raise _key_error(name, key, "another key names the same token: give it once")
        bias[int(key)] = _read_bias(f"{name}.{key}", amount)
    return bias


def _key_error(name: str, key: str, remedy: str) -> RequestError:
    return RequestError(f"{name} has the key {shown(key)}; {remedy}", code="invalid_value", param=name)


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
CHAT_READERS: Mapping[str, Reader] = {
    **_READERS,
    "logprobs": read_boolean,
    "top_logprobs": integer_between(0, MAX_LOGPROBS),
}
COMPLETION_READERS: Mapping[str, Reader] = {**_READERS, "logprobs": _read_completion_logprobs, "echo": read_boolean}
PYTHON_READERS: Mapping[str, Reader] = {**COMPLETION_READERS, "detokenize": read_boolean}

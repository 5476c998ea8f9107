"""Readers of single JSON values: types and ranges, and the error that names parameter, value and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

from blendserve.errors import RequestError

MAX_INT32 = 2**31 - 1

Reader = Callable[[str, Any], Any]


def shown(value: object) -> str:
    """A value as an error message quotes it, cut where it is long: as it stands in a file of JSON."""
    try:
        is_json = value is None or isinstance(value, bool | list | dict)
        text = json.dumps(value, ensure_ascii=False) if is_json else repr(value)
    except (TypeError, RecursionError):
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


_read_token_id = integer_between(0, MAX_INT32)


def read_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """A list of token ids. Raises: RequestError for anything that is no list of integers in [0, 2^31)."""
    if not isinstance(value, list):
        reject(name, value, "a list of token ids", code="invalid_type")
    if all(type(token_id) is int and 0 <= token_id <= MAX_INT32 for token_id in value):
        return tuple(value)
    return tuple(_read_token_id(name, token_id) for token_id in value)

"""Sampling parameters that a model recommends, put into bodies that do not give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blendserve.dialect.parameters import read_completion_parameters
from blendserve.errors import ConfigError, RequestError

DEFAULT_COMPLETION_TOKENS = 16
"""Of an OpenAI completion that gives no max_tokens."""


def checked_defaults(defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """The defaults themselves. Raises: ConfigError when a request could not give them."""
    try:
        read_completion_parameters({"prompt": "x", **defaults})
    except RequestError as error:
        raise ConfigError(
            f"the model's generation_config.json cannot be used: {error.message}; correct it, or leave it out with "
            "--generation-config vllm"
        ) from error
    return defaults


def with_defaults(body: Mapping[str, Any], defaults: Mapping[str, Any], *, is_completion: bool) -> Mapping[str, Any]:
    """The body with `defaults` where it has nothing, or null.

    A limit on new tokens counts only where the body gives none: it never cuts what a line asks for, and never lengthens
    a completion, which has its own.
    """
    missing = {name: value for name, value in defaults.items() if body.get(name) is None}
    if "max_tokens" in missing:
        least = body.get("min_tokens")
        is_less = not isinstance(least, int) or least <= missing["max_tokens"]
        is_less = is_less and (not is_completion or missing["max_tokens"] < DEFAULT_COMPLETION_TOKENS)
        if body.get("max_completion_tokens") is not None or not is_less:
            del missing["max_tokens"]
    return {**body, **missing} if missing else body

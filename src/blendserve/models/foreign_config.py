"""Numbers of a config.json whose model another engine runs: only what planning needs of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blendserve.errors import ConfigError
from blendserve.models.spec import brief

MAX_WHOLE = 1 << 40
"""Far more than any model has of anything: beyond it, products of a few such numbers overflow."""
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


def text_config_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config that has several."""
    while (part := next((config[name] for name in _PARTS if isinstance(config.get(name), Mapping)), None)) is not None:
        config = part
    return config


def whole_number(config: Mapping[str, Any], field: str, default: int = 0) -> int:
    """A number from 0 up; `default` where the config has none, or 0. Raises: ConfigError naming the field."""
    value = config.get(field) or default
    if isinstance(value, float) and value.is_integer() and value <= MAX_WHOLE:
        value = int(value)
    if type(value) is not int or not 0 <= value <= MAX_WHOLE:
        raise ConfigError(
            f"{field} is {brief(value)} in the model's configuration; it must be a whole number from 0 to {MAX_WHOLE}"
        )
    return value


def scale(config: Mapping[str, Any], field: str, default: float = 1.0) -> float:
    """A factor above 0; `default` where the config has none. Raises: ConfigError naming the field."""
    value = config.get(field) or default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_WHOLE:
        raise ConfigError(
            f"{field} is {brief(value)} in the model's configuration; it must be above 0 and at most {MAX_WHOLE}"
        )
    return float(value)

"""Rotary positions of a `config.json`: base, scaling, and the context for which they hold.

transformers 5 writes all of it into `rope_parameters`, perhaps once for each kind of layer; older ones write
`rope_theta` and `rope_scaling`. Source: transformers 5, modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blendserve.errors import ConfigError
from blendserve.models.spec import MAX_SCALING, RopeScaling, brief, brief_name

KNOWN_KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
_DEFAULT_THETA = 10000.0
_OLD_NAMES = {"su": "longrope"}
_KEYS = frozenset(
    (
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale"),
        *("mscale_all_dim", "truncate", "short_factor", "long_factor", "finetuned"),
    )
)


@dataclass(frozen=True, slots=True)
class Rope:
    """`max_position` is how far the rule holds; `context_limit` says why, where that is less than the config's own."""

    theta: float
    scaling: RopeScaling | None
    max_position: int
    context_limit: str = ""


def read_rope(name: str, config: Mapping[str, Any], max_position: int, remedy: str) -> Rope:
    """Raises: ConfigError for a rule, or a key of one, that is not known."""
    parameters = _parameters(name, config)
    for key, value in parameters.items():
        if key not in _KEYS and value is not None:
            raise ConfigError(
                f"{name}: {brief_name(key)} of the rotary scaling is {brief(value)}, which is not supported"
            )
    if (share := parameters.get("partial_rotary_factor")) not in (None, 1):
        raise ConfigError(f"{name}: partial_rotary_factor is {brief(share)}, which is not supported; {remedy}")
    holder = parameters if parameters.get("rope_theta") is not None else config
    theta = _number(name, holder, "rope_theta", _DEFAULT_THETA, most=math.inf)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    kind = _OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in KNOWN_KINDS:
        raise ConfigError(
            f"{name}: rope_type is {brief(kind)}, which is not supported; known: {', '.join(KNOWN_KINDS)}"
        )
    if kind in ("default", "dynamic"):  # dynamic scaling begins beyond the context
        return Rope(theta, None, max_position)
    if kind == "linear":
        return Rope(theta, RopeScaling("linear", _number(name, parameters, "factor")), max_position)
    original = _original(name, config, parameters, max_position)
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        factor, low, high = (_number(name, parameters, key) for key in keys)
        return Rope(theta, RopeScaling("llama3", factor, low, high, original), max_position)
    factor = _number(name, parameters, "factor", max_position / original)
    if kind == "yarn":
        return _yarn(name, parameters, theta, factor, original, max_position)
    return _longrope(name, parameters, theta, factor, original, max_position)


def _parameters(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one set of parameters that all layers have. Raises: ConfigError."""
    given = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    for value in given:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: the rotary scaling is {brief(value)} in config.json; it must be an object")
    sets = [_flat(name, value) for value in given]
    if len(sets) > 1 and sets[0] != sets[1]:
        raise ConfigError(
            f"{name}: rope_scaling and rope_parameters of config.json differ: {brief(given[0])}, {brief(given[1])}; "
            "leave one out"
        )
    return sets[0] if sets else {}


def _flat(name: str, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters by kind of layer, where all kinds have the same, as those of any."""
    by_layer = [value for value in parameters.values() if isinstance(value, Mapping)]
    if not by_layer:
        return parameters
    if any(value != by_layer[0] for value in parameters.values() if value is not None):
        raise ConfigError(
            f"{name}: rope_parameters differ from layer to layer, which is not supported: {brief(dict(parameters))}"
        )
    return by_layer[0]


def _original(name: str, config: Mapping[str, Any], parameters: Mapping[str, Any], max_position: int) -> int:
    """Positions of the context that the model was first trained on."""
    key = "original_max_position_embeddings"
    holder = config if config.get(key) is not None else parameters
    value = _number(name, holder, key, max_position)
    if value != int(value):
        raise ConfigError(f"{name}: {key} is {brief(value)}; it must be a whole number")
    return int(value)


def _yarn(
    name: str, parameters: Mapping[str, Any], theta: float, factor: float, original: int, max_position: int
) -> Rope:
    if not theta > 1:
        raise ConfigError(f"{name}: rope_theta is {theta}; yarn needs one above 1")
    truncates = parameters.get("truncate")
    if truncates not in (None, True, False):
        raise ConfigError(f"{name}: truncate of the rotary scaling is {brief(truncates)}; it must be true or false")
    scaling = RopeScaling(
        "yarn",
        factor,
        original_max_position=original,
        beta_fast=_number(name, parameters, "beta_fast", 32.0),
        beta_slow=_number(name, parameters, "beta_slow", 1.0),
        truncates=truncates is not False,
        attention_factor=_yarn_attention(name, parameters, factor),
    )
    return Rope(theta, scaling, max(max_position, int(original * factor)))


def _yarn_attention(name: str, parameters: Mapping[str, Any], factor: float) -> float:
    """What cosines and sines are multiplied by, given or as the paper has it."""
    if parameters.get("attention_factor") is not None:
        return _number(name, parameters, "attention_factor")
    scales = [_number(name, parameters, key, 0.0) for key in ("mscale", "mscale_all_dim")]
    if all(scales):
        return yarn_mscale(factor, scales[0]) / yarn_mscale(factor, scales[1])
    return yarn_mscale(factor)


def yarn_mscale(factor: float, scale: float = 1.0) -> float:
    """Growth of attention's scores with the context. Source: the YaRN paper, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(
    name: str, parameters: Mapping[str, Any], theta: float, factor: float, original: int, max_position: int
) -> Rope:
    """The rule of the original context: beyond it every position, earlier ones too, turns by other factors."""
    divisors = parameters.get("short_factor")
    if not isinstance(divisors, list) or not all(type(value) in (int, float) for value in divisors):
        raise ConfigError(f"{name}: short_factor is {brief(divisors)}; it must be a list of numbers")
    attention = parameters.get("attention_factor")
    if attention is not None:
        attention = _number(name, parameters, "attention_factor")
    elif factor <= 1 or original < 2:
        attention = 1.0
    else:
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    scaling = RopeScaling(
        "longrope",
        factor,
        original_max_position=original,
        attention_factor=attention,
        divisors=tuple(float(min(value, 2 * MAX_SCALING)) for value in divisors),
    )
    limit = "beyond them longrope turns every position otherwise, which is not supported"
    return Rope(theta, scaling, min(original, max_position), limit if original < max_position else "")


def _number(
    name: str, holder: Mapping[str, Any], key: str, default: float | None = None, most: float = MAX_SCALING
) -> float:
    value = holder.get(key)
    if value is None and default is not None:
        return float(default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        what = key if key == "rope_theta" else f"{key} of the rotary scaling"
        raise ConfigError(f"{name}: {what} is {brief(value)}; it must be a number above 0" + _at_most(most))
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name}: {key} is {brief(value)}; it is too large") from None


def _at_most(most: float) -> str:
    return "" if math.isinf(most) else f" and at most {most:g}"

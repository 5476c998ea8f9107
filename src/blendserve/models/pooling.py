"""How a model makes one vector of its states: what sentence-transformers writes beside the weights.

`modules.json` lists the steps after the model, `1_Pooling/config.json` says which states count. Models that say nothing
are read as vLLM reads them: the state of the last token, of length 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blendserve.errors import ConfigError
from blendserve.models.tokenizer import read_json

PoolingKind = Literal["last", "mean"]
_KIND_BY_MODE: dict[str, PoolingKind] = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True, slots=True)
class Pooling:
    """`last`: the state of the last token; `mean`: that of all. `normalises`: vectors have length 1."""

    kind: PoolingKind = "last"
    normalises: bool = True


LAST_TOKEN = Pooling()


def pooling_from_directory(path: Path) -> Pooling:
    """What a model's directory says. Raises: ConfigError for steps that are not supported."""
    modules = _modules(path)
    if not modules:
        return LAST_TOKEN
    kind: PoolingKind = "last"
    normalises = False
    for module in modules:
        name = str(module.get("type", "")).rpartition(".")[2]
        if name == "Pooling":
            kind = _kind_of(path / str(module.get("path", "")) / "config.json")
        elif name == "Normalize":
            normalises = True
        elif name != "Transformer":
            raise ConfigError(f"{path / 'modules.json'} has a step {name!r}; only Transformer, Pooling and Normalize")
    return Pooling(kind, normalises)


def _modules(path: Path) -> list[dict[str, Any]]:
    file = path / "modules.json"
    if not file.is_file():
        return []
    try:
        modules = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ConfigError(f"{file} is no list of steps")
    return modules


def _kind_of(file: Path) -> PoolingKind:
    """`pooling_mode` of newer files names the kind, older files have one flag for each."""
    config = read_json(file)
    named = config.get("pooling_mode")
    modes = [name for name, is_on in config.items() if name.startswith("pooling_mode_") and is_on is True]
    if isinstance(named, str):
        modes = [f"pooling_mode_{'mean_tokens' if named == 'mean' else named}"]
    if len(modes) != 1 or modes[0] not in _KIND_BY_MODE:
        raise ConfigError(
            f"{file} asks for {', '.join(modes) or 'no'} pooling; only the last token, or the mean of all, is supported"
        )
    return _KIND_BY_MODE[modes[0]]

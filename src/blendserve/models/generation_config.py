"""Sampling that a model's authors recommend: generation_config.json, read as vLLM reads it.

Its values hold where a request gives none. `do_sample` and all else in the file change nothing, as in vLLM. Source:
vLLM, ModelConfig.get_diff_sampling_param.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blendserve.errors import ConfigError
from blendserve.models.hub import ModelFiles
from blendserve.models.spec import brief
from blendserve.models.tokenizer import read_json

FROM_MODEL, NEUTRAL = "auto", "vllm"
"""Values of the setting `generation_config`: the model's own file, and none. Anything else is a directory."""
FILE_NAME = "generation_config.json"

_NAME_BY_KEY = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_WITHOUT_EFFECT: Mapping[str, tuple[float, ...]] = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
}


def sampling_defaults(files: ModelFiles, source: str = FROM_MODEL) -> dict[str, Any]:
    """Sampling parameters by the names that requests use; only those that change something.

    Raises: ConfigError when a value is no number, or `source` has no file.
    """
    if source == NEUTRAL or (source == FROM_MODEL and files.is_gguf):
        return {}
    directory = files.path if source == FROM_MODEL else Path(source).expanduser()
    path = directory / FILE_NAME
    if source != FROM_MODEL and not path.is_file():
        raise ConfigError(
            f"--generation-config {source}: there is no {path}; give auto, vllm, or a directory with a {FILE_NAME}"
        )
    values = read_json(path)
    found = {name: _number(path, key, values[key]) for key, name in _NAME_BY_KEY.items() if values.get(key) is not None}
    return {name: value for name, value in found.items() if value not in _WITHOUT_EFFECT.get(name, ())}


def shown_defaults(defaults: Mapping[str, Any]) -> str:
    """The parameters on one line."""
    return ", ".join(f"{name} {value}" for name, value in sorted(defaults.items())) or "none"


def note_of(defaults: Mapping[str, Any]) -> tuple[str, ...]:
    """What the user should know of them: nothing where there are none."""
    if not defaults:
        return ()
    return (
        f"Where a line gives none, the model's {FILE_NAME} gave {shown_defaults(defaults)}; --generation-config vllm "
        "leaves it out.",
    )


def _number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, float) and value.is_integer() and key in ("top_k", "max_new_tokens"):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1 << 31:
        raise ConfigError(
            f"{key} is {brief(value)} in {path}; it must be a number: correct it, or leave the file out with "
            "--generation-config vllm"
        )
    return value

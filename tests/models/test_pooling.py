"""What a model's files say of its embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blendserve.errors import ConfigError
from blendserve.models.pooling import Pooling, pooling_from_directory

NORMALISE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}
MODULES = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
]


def write(directory: Path, modules: Any, config: Any = None) -> Path:
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    if config is not None:
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return directory


def test_a_model_that_says_nothing_is_read_as_vllm_reads_it(tmp_path: Path) -> None:
    assert pooling_from_directory(tmp_path) == Pooling("last", normalises=True)


@pytest.mark.parametrize(
    ("modules", "config", "expected"),
    [
        ([*MODULES, NORMALISE], {"pooling_mode_lasttoken": True}, Pooling("last", normalises=True)),
        (
            MODULES,
            {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False},
            Pooling("last", normalises=False),
        ),
        ([*MODULES, NORMALISE], {"pooling_mode_mean_tokens": True}, Pooling("mean", normalises=True)),
        (MODULES, {"pooling_mode": "mean"}, Pooling("mean", normalises=False)),
        (MODULES, {"pooling_mode": "lasttoken", "include_prompt": True}, Pooling("last", normalises=False)),
    ],
)
def test_files_of_sentence_transformers(tmp_path: Path, modules: Any, config: Any, expected: Pooling) -> None:
    assert pooling_from_directory(write(tmp_path, modules, config)) == expected


@pytest.mark.parametrize(
    ("modules", "config", "message"),
    [
        (MODULES, {"pooling_mode_cls_token": True}, "pooling_mode_cls_token"),
        (MODULES, {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, "the mean of all"),
        (MODULES, None, "no pooling"),
        (
            [*MODULES, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}],
            {"pooling_mode": "mean"},
            "Dense",
        ),
        ({"0": "Pooling"}, None, "no list"),
        ([1], None, "no list"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path: Path, modules: Any, config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pooling_from_directory(write(tmp_path, modules, config))


def test_a_file_that_is_no_json_is_said(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ConfigError, match=r"modules\.json cannot be read"):
        pooling_from_directory(tmp_path)

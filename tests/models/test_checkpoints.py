"""Checkpoints in the shapes of published ones: their logits against transformers, or a refusal that names why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import LLAMA, REFUSED, SUPPORTED
from tiny_files import byte_level_tokenizer, tiny_directory

from blendserve.errors import ConfigError
from blendserve.executors.reference import ReferenceModel, prompt_logits
from blendserve.models.hf_config import spec_from_hf_config
from blendserve.models.hub import ModelFiles
from blendserve.models.load import load_model

TOKENS = np.array([1, 40, 80, 7, 300, 12, 12, 99, 200, 5] * 5, np.int32)
FORMS: tuple[dict[str, Any], ...] = (
    {"dtype": "float32"},
    {"dtype": "bfloat16", "max_shard_size": "30KB"},
    {"dtype": "float16"},
)
"""How the weights are stored: number format, and whether in one file."""


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    form = dict(FORMS[list(SUPPORTED).index(name) % len(FORMS)])
    torch.manual_seed(0)
    dtype = getattr(torch, form.pop("dtype"))
    config = transformers.AutoConfig.for_model(**{**SUPPORTED[name], "torch_dtype": None})
    factory: Any = transformers.AutoModelForCausalLM
    model = factory.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path, **form)
    (tmp_path / "config.json").write_text(json.dumps(SUPPORTED[name]))
    byte_level_tokenizer(320).save(str(tmp_path / "tokenizer.json"))
    peer = factory.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = peer(torch.tensor(TOKENS[None].astype(np.int64))).logits[0].double().numpy()
    loaded = load_model(ModelFiles("m", tmp_path))
    found = prompt_logits(ReferenceModel(loaded.spec, loaded.weights), TOKENS)
    assert len(TOKENS) <= loaded.spec.max_position
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name: str) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words) as caught:
        spec_from_hf_config("m", {**LLAMA, **changes})
    assert "known architectures: LlamaForCausalLM" in str(caught.value)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_what_a_directory_cannot_be_without(missing: str, tmp_path: Path) -> None:
    directory = tiny_directory(tmp_path / "m")
    (directory / missing).unlink()
    with pytest.raises(ConfigError, match=missing.partition(".")[0]):
        load_model(ModelFiles("m", directory))


@pytest.mark.parametrize("missing", ["tokenizer_config.json", "generation_config.json"])
def test_what_a_directory_can_be_without(missing: str, tmp_path: Path) -> None:
    directory = tiny_directory(tmp_path / "m")
    (directory / missing).unlink()
    assert load_model(ModelFiles("m", directory)).spec.eos_token_ids == (2,)

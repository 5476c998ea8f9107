"""A model of random weights is one that the engine reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import random_model

from blendserve.host import cache_dir
from blendserve.models.gguf_file import GgufFile
from blendserve.models.gguf_spec import spec_from_gguf
from blendserve.models.hub import resolve
from blendserve.models.load import load_model


@pytest.mark.model
def test_a_random_model_has_the_shape_asked_for_and_small_weights(tmp_path: Path) -> None:
    target = tmp_path / "tiny.Q8_0.gguf"
    source = resolve(None, cache_dir()).path
    random_model.write(
        target, source, hidden=64, intermediate=128, num_layers=2, num_heads=4, num_kv_heads=2, max_position=512
    )
    spec, default = spec_from_gguf("tiny", GgufFile(target)), spec_from_gguf("default", GgufFile(source))
    assert (spec.hidden_size, spec.intermediate_size, spec.num_layers, spec.max_position) == (64, 128, 2, 512)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 16)
    assert spec.vocab_size == default.vocab_size
    model = load_model(resolve(str(target), cache_dir()))
    assert len(model.tokenizer.encode_batch(["one text"])[0]) > 0
    values = model.weights.tensor("layers.1.down_proj")
    assert values.shape == (64, 128)
    assert 0.005 < float(np.std(values)) < 0.02

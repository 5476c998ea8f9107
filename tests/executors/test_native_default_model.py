"""The native executor on the default model: as likely a paragraph as the float32 specification finds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from default_model import PARAGRAPH, default_model
from numpy.typing import NDArray

from blendserve.config import Dtype, EngineConfig
from blendserve.executors.native import NativeExecutor
from blendserve.executors.reference import ReferenceModel, prompt_logits
from blendserve.request import TokenIds


def mean_nll(logits: NDArray[np.floating[Any]], token_ids: TokenIds) -> float:
    """Mean negative log likelihood of every token after the first."""
    rows = logits[:-1].astype(np.float64)
    peak = rows.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(rows - peak).sum(axis=1)) + peak[:, 0]
    return float((log_total - rows[np.arange(len(rows)), token_ids[1:]]).mean())


def native_nll(dtype: Dtype, token_ids: TokenIds) -> float:
    model = default_model()
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=256, max_model_len=512, num_threads=2, dtype=dtype)
    executor = NativeExecutor(model.spec, model.weights, config, num_blocks=32)
    result = mean_nll(executor.logits(token_ids), token_ids)
    executor.close()
    return result


@pytest.mark.model
@pytest.mark.slow
def test_the_mean_nll_of_a_paragraph_is_that_of_float32() -> None:
    model = default_model()
    token_ids = model.tokenizer.encode(PARAGRAPH)
    exact = mean_nll(prompt_logits(ReferenceModel(model.spec, model.weights), token_ids), token_ids)
    assert abs(native_nll("bf16", token_ids) / exact - 1) < 0.005


@pytest.mark.model
@pytest.mark.slow
def test_int8_finds_a_paragraph_as_likely_as_bf16_within_a_hundredth() -> None:
    token_ids = default_model().tokenizer.encode(PARAGRAPH)
    assert abs(native_nll("int8", token_ids) / native_nll("bf16", token_ids) - 1) < 0.01

"""The reference against transformers in float32: tiny random models of every architecture, and the default model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from default_model import PARAGRAPH, default_files, default_model
from numpy.typing import NDArray
from tiny_files import hf_config, hf_name
from tiny_models import CHANGES_BY_NAME, random_tokens, random_weights, tiny_spec

from blendserve.executors.reference import ReferenceModel, prompt_logits
from blendserve.models.hf_config import spec_from_hf_config
from blendserve.models.hub import resolve
from blendserve.models.load import LoadedModel, load_model
from blendserve.models.spec import ModelSpec

pytestmark = pytest.mark.peer

EPSILON = float(np.finfo(np.float32).eps)


def logits_tolerance(spec: ModelSpec, num_tokens: int, hidden_norm: float, row_norm: float) -> float:
    """Rounding errors of one path through the model add like a random walk over all of its reductions.

    Reductions of a layer: two norms, q (k, v alike), scores, mixing, output, gate, down; then the final norm and head.
    Errors are relative to the final norm's output and a row of the head; 4 standard deviations on either side.
    """
    q_width = spec.num_heads * spec.head_dim
    layer = 2 * spec.hidden_size + spec.hidden_size + spec.head_dim + num_tokens + q_width
    layer += spec.hidden_size + spec.intermediate_size
    length = spec.num_layers * layer + 2 * spec.hidden_size
    return float(8.0 * EPSILON * np.sqrt(length) * hidden_norm * row_norm)


def tolerance_of(model: LoadedModel, num_tokens: int) -> float:
    head = model.weights.tensor("embed_tokens" if model.spec.has_tied_embeddings else "lm_head")
    scale = float(np.abs(model.weights.tensor("norm")).max())
    row_norm = float(np.linalg.norm(head, axis=1).max())
    return logits_tolerance(model.spec, num_tokens, scale * float(np.sqrt(model.spec.hidden_size)), row_norm)


def transformers_logits(model: Any, token_ids: NDArray[np.int32]) -> NDArray[np.float64]:
    import torch

    with torch.no_grad():
        logits = model(torch.tensor(token_ids[None].astype(np.int64))).logits
    return np.asarray(logits[0].double().numpy())


def save_with_transformers(spec: ModelSpec, path: Path) -> Any:
    """Build the model from our random weights in transformers, save it its way, and return it."""
    import torch
    import transformers

    weights = random_weights(spec)
    config = transformers.AutoConfig.for_model(**hf_config(spec))
    factory: Any = transformers.AutoModelForCausalLM
    model = factory.from_config(config, attn_implementation="eager").float().eval()
    state = {hf_name(name): torch.from_numpy(weights.tensor(name)) for name in weights.shape_by_name}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if spec.has_tied_embeddings else [])
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("name", CHANGES_BY_NAME)
def test_tiny_models(name: str, tmp_path: Path) -> None:
    """Config (as transformers 5 writes it), weights and forward pass, all from the saved directory."""
    from tiny_files import byte_level_tokenizer

    spec = tiny_spec(name)
    peer = save_with_transformers(spec, tmp_path)
    byte_level_tokenizer(spec.vocab_size).save(str(tmp_path / "tokenizer.json"))
    assert spec_from_hf_config(spec.name, json.loads((tmp_path / "config.json").read_bytes())) == spec

    loaded = load_model(resolve(str(tmp_path), tmp_path))
    token_ids = random_tokens(spec, 100)
    ours = prompt_logits(ReferenceModel(loaded.spec, loaded.weights), token_ids)
    theirs = transformers_logits(peer, token_ids)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance_of(loaded, len(token_ids)))


@pytest.fixture(scope="module")
def peer_default() -> Any:
    import transformers

    path = default_files().path
    factory: Any = transformers.AutoModelForCausalLM
    return factory.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").eval()


def mean_negative_log_likelihood(logits: NDArray[np.float64], token_ids: NDArray[np.int32]) -> float:
    largest = logits.max(axis=1, keepdims=True)
    logprobs = logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    return float(-logprobs[np.arange(len(token_ids) - 1), token_ids[1:]].mean())


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the peer's own
def test_default_model(peer_default: Any) -> None:
    """Weights of the GGUF (q and k rows put back in order) and forward pass; then the likelihood of a paragraph."""
    import torch

    loaded = default_model()
    state = peer_default.state_dict()
    for name in ("embed_tokens", "norm", *(f"layers.{layer}.{stem}_proj" for layer in (0, 29) for stem in "qkvo")):
        theirs = state[hf_name(name)]
        assert torch.equal(torch.from_numpy(loaded.weights.tensor(name)), theirs), name
    token_ids = loaded.tokenizer.encode(PARAGRAPH)
    theirs_logits = transformers_logits(peer_default, token_ids)
    exact = prompt_logits(ReferenceModel(loaded.spec, loaded.weights), token_ids)
    np.testing.assert_allclose(exact, theirs_logits, rtol=0, atol=tolerance_of(loaded, len(token_ids)))

    expected = mean_negative_log_likelihood(theirs_logits, token_ids)
    rounded = prompt_logits(ReferenceModel(loaded.spec, loaded.weights, "bf16"), token_ids)
    assert mean_negative_log_likelihood(exact, token_ids) == pytest.approx(expected, rel=1e-5)
    assert mean_negative_log_likelihood(rounded, token_ids) == pytest.approx(expected, rel=5e-3)

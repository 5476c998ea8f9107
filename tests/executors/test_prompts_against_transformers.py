"""Log probabilities and embeddings of the native engine against transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from default_model import default_files, default_model
from numpy.typing import NDArray
from test_reference_against_transformers import save_with_transformers, tolerance_of, transformers_logits
from tiny_files import byte_level_tokenizer
from tiny_models import random_tokens, tiny_spec

from blendserve import LLM, SamplingParams
from blendserve.executors.reference import ReferenceModel, prompt_logits
from blendserve.models.pooling import Pooling
from blendserve.request import TokenIds

pytestmark = pytest.mark.peer

QUESTION = (
    "Sound travels through air, water and steel, but not at one speed: the stiffer the matter, the faster the wave. "
    "Question: through which of these does sound travel fastest?\nAnswer:"
)
CHOICES = (" steel", " water", " air", " all of them alike")


def logprobs_of(logits: NDArray[np.float64], token_ids: TokenIds) -> NDArray[np.float64]:
    """Of every token after the first."""
    rows = logits[:-1] - logits[:-1].max(axis=1, keepdims=True)
    return np.asarray(rows[np.arange(len(rows)), token_ids[1:]] - np.log(np.exp(rows).sum(axis=1)))


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the peer's own
def test_choices_of_a_question_are_as_likely_as_transformers_finds_them() -> None:
    """Each log probability is as near to that of float32 as the specification in bfloat16 is, twice over."""
    import transformers

    model, path = default_model(), default_files().path
    factory: Any = transformers.AutoModelForCausalLM
    peer = factory.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").eval()
    prompts = [model.tokenizer.encode(QUESTION + choice) for choice in CHOICES]
    specification = ReferenceModel(model.spec, model.weights, "bf16", has_bf16_products=True)
    with LLM(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=256) as llm:
        outputs = llm.generate([ids.tolist() for ids in prompts], SamplingParams(max_tokens=0, prompt_logprobs=1))
    for token_ids, output in zip(prompts, outputs, strict=True):
        exact = logprobs_of(transformers_logits(peer, token_ids), token_ids)
        rounded = logprobs_of(prompt_logits(specification, token_ids), token_ids)
        assert output.prompt_logprobs is not None
        found = np.array([entry.logprob for entry in output.prompt_logprobs if entry is not None])
        assert np.abs(found - exact).max() <= 2 * np.abs(rounded - exact).max()
        assert np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max(), "the comparison could not fail"
    first, *others = sorted(output.num_cached_tokens for output in outputs)
    assert first == 0
    assert min(others) >= 32, "the question is read once"


@pytest.mark.parametrize("pooling", [Pooling("last", normalises=False), Pooling("mean", normalises=True)])
def test_embeddings_are_states_of_transformers(pooling: Pooling, tmp_path: Path) -> None:
    """What sentence-transformers would make of the states after the final norm, rounding to bfloat16 aside."""
    import torch

    spec = tiny_spec("qwen3")
    peer = save_with_transformers(spec, tmp_path)
    byte_level_tokenizer(spec.vocab_size).save(str(tmp_path / "tokenizer.json"))
    write_pooling(tmp_path, pooling)
    prompts = [random_tokens(spec, length, seed=length) for length in (40, 17, 1)]
    with LLM(str(tmp_path), max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128) as llm:
        outputs = llm.embed([prompt.tolist() for prompt in prompts])
        tolerance = tolerance_of(llm.model, 40) * 2**16  # of float32 as of bfloat16
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            states = peer.model(torch.tensor(prompt[None].astype(np.int64))).last_hidden_state[0].double().numpy()
        vector = states[-1] if pooling.kind == "last" else states.mean(axis=0)
        expected = vector / np.linalg.norm(vector) if pooling.normalises else vector
        assert output.error is None
        distance = float(np.linalg.norm(np.array(output.outputs.embedding) - expected))
        assert distance <= min(tolerance, 2**-6 * float(np.linalg.norm(expected)))


def write_pooling(directory: Path, pooling: Pooling) -> None:
    """The files of sentence-transformers."""
    import json

    steps = ["Transformer", "Pooling", *(["Normalize"] if pooling.normalises else [])]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{step}" if number else "",
            "type": f"sentence_transformers.models.{step}",
        }
        for number, step in enumerate(steps)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    modes = {"pooling_mode_lasttoken": pooling.kind == "last", "pooling_mode_mean_tokens": pooling.kind == "mean"}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 96, **modes}))

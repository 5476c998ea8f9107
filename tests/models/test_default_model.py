"""The default model from its GGUF file: tokenizer, template, and a first answer that makes sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from default_model import PARAGRAPH, default_files, default_model

from blendserve.executors.reference import KvCache, ReferenceModel

pytestmark = pytest.mark.model

TEXTS = (
    PARAGRAPH,
    "Grüße aus Zürich! 東京タワー 🚂🇨🇭 naïve café",
    "def f(x):\n    return x ** 2  # 1234567 3.14\n\n\n\tprint('x')",
    "  leading, trailing  \n",
    "it's we'll I'M 'tis <|im_start|>user\nhi<|im_end|>",
    "\x00\x7f\u200b\ufeff zero width",
    "",
)
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat_template() -> None:
    tokenizer = default_model().tokenizer
    assert tokenizer.apply_chat_template(FRANCE) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(tokenizer.apply_chat_template(FRANCE), add_special_tokens=False)
    assert ids[:3].tolist() == [1, 9690, 198]
    assert tokenizer.eos_token_ids == (2, 0)  # the file names <|im_end|>, and <|endoftext|> is an end by its name
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>"


def test_known_strings() -> None:
    """Ids that the published tokenizer.json gives (digits apart, no merges across them)."""
    tokenizer = default_model().tokenizer
    assert tokenizer.encode("Hello 1234 world").tolist() == [19556, 216, 33, 34, 35, 36, 905]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_spec() -> None:
    spec = default_model().spec
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (30, 576, 9, 3)
    assert (spec.rope_theta, spec.rms_norm_eps, spec.max_position) == (100000.0, 1e-5, 8192)
    assert spec.num_parameters == 134_479_872


@pytest.mark.slow
def test_the_capital_of_france() -> None:
    loaded = default_model()
    model = ReferenceModel(loaded.spec, loaded.weights)
    tokens = loaded.tokenizer.encode(loaded.tokenizer.apply_chat_template(FRANCE), add_special_tokens=False)
    cache, blocks = KvCache(loaded.spec, 8, 16, model.precision), np.arange(8, dtype=np.int32)
    answer: list[int] = []
    position = 0
    while len(answer) < 12 and not set(answer) & set(loaded.spec.eos_token_ids):
        hidden = model.hidden_states(tokens, position, cache, blocks)
        position += len(tokens)
        answer.append(int(model.logits(hidden[-1:])[0].argmax()))
        tokens = np.array(answer[-1:], dtype=np.int32)
    assert loaded.tokenizer.decode(answer) == "The capital of France is Paris."


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the peer's own
def test_tokenizer_against_transformers() -> None:
    import transformers

    path = default_files().path
    factory: Any = transformers.AutoTokenizer
    peer = factory.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = default_model().tokenizer
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == peer(text)["input_ids"], text
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert tokenizer.apply_chat_template(FRANCE) == peer.apply_chat_template(
        FRANCE, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.eos_token_ids[0] == peer.eos_token_id

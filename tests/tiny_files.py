"""Tiny models as files: a Hugging Face directory or a GGUF file, complete with a tokenizer, written without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
import tokenizers
from tiny_models import random_weights, tiny_spec
from tokenizers import decoders, models, pre_tokenizers, trainers

from blendserve.models.spec import ModelSpec
from blendserve.models.weights import Weights

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
BOS_TOKEN_ID = 1
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_TRAINING_TEXT = (
    "the capital of france is paris and the answer to the question is in the text that the user gave before",
    "user: what is the name of the other one? assistant: there are 12 of them, 345 in all, and none is the same.",
)
_HF_STEMS = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **{f"{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"},
    **{f"{name}_norm": f"self_attn.{name}_norm" for name in "qk"},
    **{f"{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_GGUF_STEMS = {
    "input_norm": "attn_norm",
    "post_attention_norm": "ffn_norm",
    "o_proj": "attn_output",
    **{f"{name}_proj": f"attn_{name}" for name in "qkv"},
    **{f"{name}_norm": f"attn_{name}_norm" for name in "qk"},
    **{f"{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def tiny_directory(path: Path, name: str = "llama", seed: int = 0) -> Path:
    """A complete model directory of `tiny_spec(name)` with random weights; returns `path`."""
    spec = tiny_spec(name)
    write_directory(path, spec, random_weights(spec, seed))
    return path


def write_directory(path: Path, spec: ModelSpec, weights: Weights) -> None:
    path.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(name): weights.tensor(name) for name in weights.shape_by_name}
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(hf_config(spec)))
    byte_level_tokenizer(spec.vocab_size).save(str(path / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**special, "chat_template": CHAT_TEMPLATE}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(spec.eos_token_ids)}))


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """config.json as transformers 4 writes it."""
    config: dict[str, Any] = {
        "model_type": spec.architecture,
        "architectures": [f"{spec.architecture.capitalize()}ForCausalLM"],
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": spec.has_tied_embeddings,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": spec.eos_token_ids[0],
        "hidden_act": "silu",
    }
    if (scaling := spec.rope_scaling) is not None:
        config["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            config["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
        if scaling.kind in ("yarn", "longrope"):
            config["rope_scaling"] |= {
                "original_max_position_embeddings": scaling.original_max_position,
                "attention_factor": scaling.attention_factor,
            }
        if scaling.kind == "yarn":
            config["rope_scaling"] |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.kind == "longrope":
            factors = list(scaling.divisors)
            config["rope_scaling"] |= {"short_factor": factors, "long_factor": [2 * factor for factor in factors]}
    return config


def hf_name(name: str) -> str:
    """`layers.0.q_proj.bias` -> `model.layers.0.self_attn.q_proj.bias`."""
    if name == "lm_head":
        return "lm_head.weight"
    if not name.startswith("layers."):
        return f"model.{name}.weight"
    _, layer, stem, *bias = name.split(".")
    return f"model.layers.{layer}.{_HF_STEMS[stem]}.{'bias' if bias else 'weight'}"


def gguf_name(name: str) -> str:
    """`layers.0.q_proj.bias` -> `blk.0.attn_q.bias`."""
    top = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight", "lm_head": "output.weight"}
    if name in top:
        return top[name]
    _, layer, stem, *bias = name.split(".")
    return f"blk.{layer}.{_GGUF_STEMS[stem]}.{'bias' if bias else 'weight'}"


def write_gguf(path: Path, spec: ModelSpec, weights: Weights, kind: str = "F32") -> None:
    """A GGUF file as llama.cpp's converter writes it, its matrices quantised to `kind`."""
    writer = gguf.GGUFWriter(path, spec.architecture)
    writer.add_name(spec.name)
    _add_sizes(writer, spec)
    _add_tokenizer(writer, spec)
    for name in weights.shape_by_name:
        tensor = weights.tensor(name)
        if spec.architecture == "llama" and name.endswith(("q_proj", "k_proj")):
            tensor = _interleaved(tensor, spec.num_heads if name.endswith("q_proj") else spec.num_kv_heads)
        quantization = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name(name), gguf.quantize(tensor, quantization), raw_dtype=quantization)
    if spec.rope_scaling is not None and spec.rope_scaling.kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(spec).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(spec: ModelSpec) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The divisors that llama.cpp's converter stores, by its own loop."""
    scaling = spec.rope_scaling
    assert scaling is not None
    low_wavelength = scaling.original_max_position / scaling.low_freq_factor
    high_wavelength = scaling.original_max_position / scaling.high_freq_factor
    factors = []
    for pair in range(0, spec.head_dim, 2):
        wavelength = 2 * np.pi * spec.rope_theta ** (pair / spec.head_dim)
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(scaling.factor)
        else:
            smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors)


def byte_level_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE over a few English lines; its first ids are `SPECIAL_TOKENS`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    return tokenizer


def _interleaved(tensor: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """The row order of llama.cpp's converter for Llama's q and k."""
    pairs = tensor.reshape(num_heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2)
    return np.ascontiguousarray(pairs.reshape(tensor.shape))


def _add_sizes(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    writer.add_context_length(spec.max_position)
    writer.add_block_count(spec.num_layers)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    if spec.rope_scaling is not None and spec.rope_scaling.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(spec.rope_scaling.kind))
        writer.add_rope_scaling_factor(spec.rope_scaling.factor)
        if spec.rope_scaling.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(spec.rope_scaling.original_max_position)


def _add_tokenizer(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    described = json.loads(byte_level_tokenizer(spec.vocab_size).to_str())["model"]
    vocabulary = sorted(described["vocab"], key=described["vocab"].__getitem__)
    vocabulary += [f"[PAD{index}]" for index in range(len(vocabulary), spec.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in vocabulary])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in described["merges"]])
    writer.add_bos_token_id(BOS_TOKEN_ID)
    writer.add_eos_token_id(spec.eos_token_ids[0])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

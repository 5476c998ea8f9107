"""Configurations as published checkpoints have them, with all of their keys, shrunk to one or two small layers."""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.3,
    "use_cache": True,
}
_LLAMA = {**_SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
_QWEN2 = {
    **_SIZES,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 1,
}
_MISTRAL = {**_SIZES, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "rms_norm_eps": 1e-5}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SUPPORTED: dict[str, dict[str, Any]] = {
    "llama-1": {**_LLAMA, "num_key_value_heads": None, "max_position_embeddings": 2048, "pad_token_id": -1},
    "llama-2": {
        **{**_LLAMA, "num_key_value_heads": 4, "max_position_embeddings": 4096, "pretraining_tp": 1},
        **{"rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16"},
    },
    "llama-3": {
        **{**_LLAMA, "max_position_embeddings": 8192, "rope_theta": 500000.0, "attention_bias": False},
        **{"attention_dropout": 0.0, "pretraining_tp": 1, "torch_dtype": "bfloat16"},
    },
    "llama-3.1": {
        **{**_LLAMA, "max_position_embeddings": 512, "rope_theta": 500000.0, "rope_scaling": _LLAMA3},
        **{"mlp_bias": False, "attention_bias": False, "eos_token_id": [2, 3, 4]},
    },
    "llama-3.2": {
        **{**_LLAMA, "max_position_embeddings": 512, "rope_theta": 500000.0, "head_dim": 16},
        **{"rope_scaling": {**_LLAMA3, "factor": 32.0}, "tie_word_embeddings": True},
    },
    "llama, written by transformers 5": {
        **{**_LLAMA, "max_position_embeddings": 512, "dtype": "float32", "head_dim": 8},
        "rope_parameters": {**_LLAMA3, "rope_theta": 500000.0},
    },
    "tinyllama": {**_LLAMA, "max_position_embeddings": 2048, "rope_scaling": None, "num_key_value_heads": 1},
    "smollm2": {
        **{**_LLAMA, "max_position_embeddings": 8192, "rope_theta": 100000, "rope_interleaved": False},
        **{"is_llama_config": True, "tie_word_embeddings": True, "transformers.js_config": {"dtype": "q4"}},
    },
    "deepseek-coder": {
        **{**_LLAMA, "max_position_embeddings": 16384, "rope_theta": 100000},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "yi, with dynamic scaling": {
        **{**_LLAMA, "max_position_embeddings": 4096, "rope_theta": 5000000.0},
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "llama, with yarn": {
        **{**_LLAMA, "max_position_embeddings": 512, "head_dim": 16},
        "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "finetuned": True},
    },
    "mistral-0.1": {**_MISTRAL, "max_position_embeddings": 32768, "sliding_window": 4096, "rope_theta": 10000.0},
    "mistral-0.3": {**_MISTRAL, "max_position_embeddings": 32768, "sliding_window": None, "rope_theta": 1000000.0},
    "mistral, without a window": {**_MISTRAL, "max_position_embeddings": 32768, "head_dim": 16},
    "qwen-2": {**_QWEN2, "max_position_embeddings": 131072, "rope_theta": 1000000.0, "tie_word_embeddings": True},
    "qwen-2.5": {**_QWEN2, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "use_mrope": False},
    "qwen-2.5, with yarn": {
        **{**_QWEN2, "max_position_embeddings": 64, "rope_theta": 1000000.0},
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"},
    },
    "qwen-2, with windows": {
        **{**_QWEN2, "max_position_embeddings": 4096, "use_sliding_window": True, "sliding_window": 64}
    },
    "qwen-3": {
        **{**_QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
        **{"max_position_embeddings": 40960, "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None},
        **{"attention_bias": False, "tie_word_embeddings": True},
    },
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "phi-3": ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, "Phi3ForCausalLM"),
    "gemma": ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
    "gemma-2": ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM"),
    "gemma-3": ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM"),
    "mixtral": ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
    "qwen-3 experts": ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
    "gpt-oss": ({"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}, "GptOssForCausalLM"),
    "smollm-3": ({"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}, "SmolLM3ForCausalLM"),
    "granite": ({"model_type": "granite", "architectures": ["GraniteForCausalLM"]}, "GraniteForCausalLM"),
    "granite, called llama": ({"embedding_multiplier": 12.0, "logits_scaling": 8.0}, "embedding_multiplier is 12.0"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "internlm, called llama": ({"bias": True}, "bias is True"),
    "llama, with biases": ({"attention_bias": True}, "attention_bias is True"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config is"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "quantization is"),
    "stablelm, called llama": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
    "an embedder": ({"is_causal": False}, "is_causal is False"),
    "a vision model": ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, "Qwen2VLFor"),
}
"""What is changed of a Llama, and the words that name it."""
LLAMA = SUPPORTED["llama-3"]

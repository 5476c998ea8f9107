"""Constructor options of vLLM's `LLM`, beside our own: taken where they change no answer here, else refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from blendserve.config import Dtype, KvDtype
from blendserve.dialect.values import shown
from blendserve.errors import ConfigError

IGNORED_OPTIONS = frozenset(
    (
        *("gpu_memory_utilization", "swap_space", "cpu_offload_gb", "num_gpu_blocks_override", "block_size"),
        *("enforce_eager", "compilation_config", "max_seq_len_to_capture", "cuda_graph_sizes", "attention_backend"),
        *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel"),
        *("distributed_executor_backend", "disable_custom_all_reduce", "max_parallel_loading_workers"),
        *("enable_chunked_prefill", "max_num_partial_prefills", "scheduling_policy", "async_scheduling"),
        *("disable_async_output_proc", "disable_cascade_attn", "disable_sliding_window", "num_scheduler_steps"),
        *("disable_log_stats", "disable_log_requests", "collect_detailed_traces", "show_hidden_metrics_for_version"),
        *("trust_remote_code", "download_dir", "hf_token", "ignore_patterns", "use_tqdm_on_load", "max_logprobs"),
        *("speculative_config", "guided_decoding_backend", "structured_outputs_config", "reasoning_parser"),
        *("limit_mm_per_prompt", "mm_processor_kwargs", "mm_processor_cache_gb", "allowed_local_media_path"),
        *("allowed_media_domains", "interleave_mm_strings", "disable_mm_preprocessor_cache", "max_loras"),
        *("max_lora_rank", "enable_sleep_mode", "performance_mode", "optimization_level", "kv_events_config"),
    )
)
"""They change time and memory on GPUs, or concern what no text model here does: never an answer."""

_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "device": ("auto", "cpu"),
    "load_format": ("auto", "hf", "safetensors", "gguf"),
    "tokenizer_mode": ("auto", "hf", "fast"),
    "skip_tokenizer_init": (False,),
    "config_format": ("auto", "hf"),
    "model_impl": ("auto", "vllm"),
    "quantization": (),
    "hf_overrides": ({},),
    "hf_config_path": (),
    "rope_scaling": ({},),
    "rope_theta": (),
    "tokenizer_revision": (),
    "code_revision": (),
    "enable_lora": (False,),
    "enable_prompt_adapter": (False,),
    "enable_prompt_embeds": (False,),
    "logits_processors": ([],),
    "logprobs_mode": ("raw_logprobs",),
    "pooler_config": (),
    "override_pooler_config": (),
    "kv_transfer_config": (),
    "worker_cls": ("auto",),
}
"""Options that are taken only with these values, or None: any other would change the answers, or is not there."""

_INSTEAD = {
    "enable_lora": "answer with vLLM (VllmSettings, or --engine vllm --lora NAME=PATH)",
    "quantization": 'give dtype="int8", or a .gguf file as the model',
    "device": "answer with vLLM (VllmSettings, or --engine vllm)",
}
_DTYPES: Mapping[str, Dtype] = {"auto": "bf16", "bfloat16": "bf16", "bf16": "bf16", "int8": "int8"}
_KV_DTYPES: Mapping[str, KvDtype] = {"auto": "bf16", "bfloat16": "bf16", "bf16": "bf16", "int8": "int8"}


def read_options(options: Mapping[str, Any], known: tuple[str, ...]) -> str | None:
    """Check vLLM's options. Returns: a sentence that names those which have no effect here; None where there are none.

    `known` are the options that the caller reads itself, for corrections of spelling. Raises: ConfigError.
    """
    ignored = []
    for name, value in options.items():
        if name in IGNORED_OPTIONS:
            if value is not None:
                ignored.append(name)
        elif name in _ALLOWED:
            if value is not None and value not in _ALLOWED[name]:
                _refuse(name, value)
        else:
            close = difflib.get_close_matches(name, (*known, *IGNORED_OPTIONS, *_ALLOWED), 1)
            hint = f"; did you mean {close[0]}?" if close else ": help(LLM) lists all options"
            raise ConfigError(f"LLM has no option {name[:100]!r}{hint}")
    if not ignored:
        return None
    return f"{', '.join(ignored)}: without effect on this engine, which runs on the CPU; answers are the same."


def _refuse(name: str, value: Any) -> None:
    allowed = " or ".join(["None", *(repr(other) for other in _ALLOWED[name])])
    instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
    raise ConfigError(f"{name} is {shown(value)}, which this engine does not have; it must be {allowed}{instead}")


def dtype_of(value: Any) -> Dtype:
    """The precision that vLLM's name stands for. Raises: ConfigError for one that is not computed here."""
    found = _DTYPES.get(str(value).removeprefix("torch."))
    if found is None:
        raise ConfigError(f'dtype is {shown(value)}; this engine computes in "bf16" (the same as "auto") or "int8"')
    return found


def kv_dtype_of(value: Any) -> KvDtype:
    """The same for the KV cache."""
    found = _KV_DTYPES.get(str(value).removeprefix("torch."))
    if found is None:
        raise ConfigError(f'kv_cache_dtype is {shown(value)}; it must be "auto", "bfloat16" or "int8"')
    return found

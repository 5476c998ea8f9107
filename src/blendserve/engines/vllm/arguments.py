"""From settings to the fields of vLLM's `EngineArgs`, and to the environment that vLLM reads when it is imported.

A limit that was not given is left out: vLLM's own default stands.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from blendserve.costs.model_cost import ModelCost
from blendserve.engine.limits import MAX_KV_SHARE
from blendserve.engines.settings import VllmSettings
from blendserve.engines.vllm.api import hide_secrets, is_cpu_build, is_secret, is_tested
from blendserve.errors import ConfigError
from blendserve.host import available_memory_bytes, usable_cores
from blendserve.models.foreign_config import scale, whole_number
from blendserve.models.generation_config import FROM_MODEL
from blendserve.models.tokenizer import read_json

CPU_BLOCK_SIZE = 32
"""What vLLM's CPU kernels want: multiples of it."""
_CPU_NUM_SEQS = 256
"""Requests that KV memory on a CPU is sized for where their number was left to vLLM."""
SCHEDULER = "blendserve.engines.vllm.scheduler.BlendScheduler"
ASYNC_SCHEDULER = "blendserve.engines.vllm.scheduler.BlendAsyncScheduler"
_MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"


def prepare_environment(environment: MutableMapping[str, str], settings: VllmSettings) -> None:
    """Set what vLLM takes from the environment when it is imported; what the user has set stays."""
    defaults = {
        _MULTIPROCESSING: "1" if settings.own_process else "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # only the first host is one that the user allowed
    }
    if is_cpu_build():
        num_threads = settings.num_threads or usable_cores()
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(num_threads)}
    for name, value in defaults.items():
        environment.setdefault(name, value)


def engine_arguments(
    settings: VllmSettings, path: Path, model: ModelCost, max_model_len: int, *, is_cpu: bool
) -> dict[str, Any]:
    """Fields of vLLM's EngineArgs. What `settings.arguments` says comes last. `max_model_len` is the model's own where
    none was given, 0 where its config does not say."""
    arguments: dict[str, Any] = {
        "model": str(path),
        "enable_prefix_caching": settings.enable_prefix_caching,
        "disable_log_stats": False,
        "enable_mfu_metrics": True,
    }
    for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
        if value := getattr(settings, name):
            arguments[name] = value
    if is_cpu:
        most_bytes = int(available_memory_bytes() * MAX_KV_SHARE * settings.memory_share)
        num_seqs = settings.max_num_seqs or _CPU_NUM_SEQS
        memory = settings.kv_memory_bytes or default_kv_memory(model, num_seqs, max_model_len, most_bytes)
        arguments |= {"kv_cache_memory_bytes": memory, "block_size": CPU_BLOCK_SIZE, "enforce_eager": True}
    elif settings.kv_memory_bytes:
        arguments["kv_cache_memory_bytes"] = settings.kv_memory_bytes
    if settings.adapters:
        arguments |= {
            "enable_lora": True,
            "max_loras": lora_slots(len(settings.adapters), is_cpu=is_cpu),
            "max_lora_rank": largest_rank(settings.adapters),
        }
    if settings.image_domains:
        arguments["allowed_media_domains"] = [domain.lower() for domain in settings.image_domains]
    if settings.generation_config != FROM_MODEL:
        arguments["generation_config"] = settings.generation_config
    if settings.task == "embed":
        arguments |= {"runner": "pooling", "convert": "embed"}
    elif follows_our_grammars(settings):
        arguments["structured_outputs_config"] = {"backend": "guidance"}
    return arguments | dict(settings.arguments)


def follows_our_grammars(settings: VllmSettings) -> bool:
    """Is vLLM told to use llguidance, which takes grammars as our own engine has them? Else the user chose."""
    return "structured_outputs_config" not in settings.arguments


def lets_reasoning_through(settings: VllmSettings) -> bool:
    """Do grammars have to let reasoning through? Not where vLLM has a parser of reasoning, which tells it."""
    return follows_our_grammars(settings) and "reasoning_parser" not in settings.arguments


def scheduler_class(settings: VllmSettings, release: str, *, is_cpu: bool) -> tuple[str | None, str | None]:
    """Our scheduler where it was asked for and can be put in, and else why requests go in from outside."""
    if settings.scheduler != "blend" or "scheduler_cls" in settings.arguments:
        return None, None
    if not is_tested(release):
        return None, f"vLLM is {release}, on which its scheduler was not tested: requests went in from outside"
    if settings.own_process or os.environ.get(_MULTIPROCESSING) == "1":
        return None, "vLLM runs in a process of its own, out of the policy's reach: requests went in from outside"
    is_async = not is_cpu and settings.arguments.get("async_scheduling") is not False
    return ASYNC_SCHEDULER if is_async else SCHEDULER, None


def context_length_of(text_config: Mapping[str, Any]) -> int:
    """Tokens that a model takes; its positions may be scaled. 0 where the config does not say. vLLM's own limit, which
    may be lower, holds besides."""
    length = whole_number(text_config, "max_position_embeddings")
    scaling = text_config.get("rope_scaling") or text_config.get("rope_parameters")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) in ("yarn", "linear", "dynamic"):
        original = whole_number(scaling, "original_max_position_embeddings", length)
        length = max(length, int(original * scale(scaling, "factor")))
    return length


def default_kv_memory(model: ModelCost, max_num_seqs: int, max_model_len: int, most_bytes: int) -> int:
    """Bytes for the KV cache on a CPU: what the requests could fill at most, within `most_bytes`."""
    wanted = int(max_num_seqs * max(max_model_len, 1) * model.kv_bytes_per_token)
    return min(most_bytes, wanted)


def check_adapters(adapters: Mapping[str, str]) -> None:
    """Raises: ConfigError where a path holds no adapter."""
    for name, path in adapters.items():
        if not (Path(path) / "adapter_config.json").is_file():
            raise ConfigError(
                f"adapter {name!r}: {path} has no adapter_config.json; give the directory of a LoRA adapter"
            )


def lora_slots(num_adapters: int, *, is_cpu: bool) -> int:
    """Places for adapters. On vLLM's CPU build (seen on 0.32) requests without an adapter get that of the last place
    when they share a step with one that has any: there it stays empty.
    """
    return num_adapters + 1 if is_cpu else num_adapters


def largest_rank(adapters: Mapping[str, str]) -> int:
    """The rank that vLLM must have room for: the largest of the adapters, as it offers them."""
    rank = max(whole_number(read_json(Path(path) / "adapter_config.json"), "r", 8) for path in adapters.values())
    return next((size for size in (8, 16, 32, 64, 128, 256, 320) if size >= rank), rank)


def shown_arguments(arguments: Mapping[str, Any]) -> str:
    """Other arguments of vLLM as a journal may hold them: without keys and tokens inside."""
    return ", ".join(sorted(_shown(name, value) for name, value in arguments.items() if not is_secret(name)))


def _shown(name: str, value: Any) -> str:
    return f"{name}={value}" if isinstance(value, str) else f"{name}={json.dumps(hide_secrets(value), sort_keys=True)}"

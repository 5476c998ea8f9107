"""From parsed options to the settings of an engine: the one place where the two are mapped."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blendserve.cli.options import chat_settings
from blendserve.config import EngineConfig
from blendserve.engines.settings import (
    EngineSettings,
    HttpSettings,
    NativeSettings,
    ReplicaSettings,
    SingleSettings,
    VllmSettings,
)
from blendserve.errors import ConfigError


def engine_settings(args: argparse.Namespace) -> EngineSettings:
    """The engine that the options ask for, on replicas where they ask for those. Raises: ConfigError."""
    return single_settings(args) if args.replicas is None else replica_settings(args)


def replica_settings(args: argparse.Namespace) -> ReplicaSettings:
    """What the options say of replicas. Raises: ConfigError."""
    return ReplicaSettings(
        num_replicas=args.replicas,
        ray_address=args.ray_address,
        num_cpus=args.replica_cpus,
        num_gpus=args.replica_gpus,
        placement=args.placement,
        max_restarts=args.max_restarts,
        engine=single_settings(args),
    )


def single_settings(args: argparse.Namespace) -> SingleSettings:
    """What the options say of the engine of one process. Raises: ConfigError."""
    by_name: dict[str, Callable[[argparse.Namespace], SingleSettings]] = {
        "native": _native,
        "http": _http,
        "vllm": _vllm,
    }
    return by_name[args.engine](args)


def _native(args: argparse.Namespace) -> NativeSettings:
    return NativeSettings(
        model=args.model,
        max_model_len=args.max_model_len,
        kv_memory_bytes=args.kv_memory,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        num_threads=args.threads,
        enable_prefix_caching=not args.no_prefix_caching,
        overlap=args.overlap,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        isa=args.isa,
        window=args.window,
        revision=args.revision,
        generation_config=args.generation_config,
        chat=chat_settings(args),
    )


def planned_config(args: argparse.Namespace) -> EngineConfig:
    """Limits of the run that a plan is for. Raises: ConfigError."""
    return NativeSettings(
        kv_memory_bytes=args.kv_memory,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        num_threads=args.threads,
        overlap=args.overlap,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
    ).config()


def _http(args: argparse.Namespace) -> HttpSettings:
    if args.base_url is None:
        raise ConfigError("--engine http needs the server's address: --base-url http://localhost:8000/v1")
    return HttpSettings(
        base_url=args.base_url,
        model=args.model,
        tokenizer=args.tokenizer,
        max_inflight=args.max_inflight,
        kv_tokens=args.kv_tokens,
        request_timeout_s=args.request_timeout,
        max_attempts=args.max_attempts,
        max_outage_s=args.max_outage,
        headers=read_headers(args.header),
    )


def _vllm(args: argparse.Namespace) -> VllmSettings:
    if args.model is None:
        raise ConfigError("--engine vllm needs --model: a Hugging Face directory, or a hub id (owner/name)")
    return VllmSettings(
        model=args.model,
        max_model_len=args.max_model_len,
        kv_memory_bytes=args.kv_memory,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        num_threads=args.threads,
        enable_prefix_caching=not args.no_prefix_caching,
        task=args.task,
        adapters=read_adapters(args.lora),
        scheduler=args.vllm_scheduler,
        own_process=args.own_process,
        arguments=dict(parse_argument(text) for text in args.vllm_arg),
        revision=args.revision,
        image_domains=tuple(args.image_domain),
        generation_config=args.generation_config,
        chat=chat_settings(args),
    )


def read_headers(options: list[str]) -> dict[str, str]:
    """NAME=VALUE or "NAME: VALUE", each name once -> values by name. Raises: ConfigError, without the value."""
    headers: dict[str, str] = {}
    for option in options:
        name, _, value = re.split("([:=])", option, maxsplit=1) if re.search("[:=]", option) else ("", "", "")
        name = name.strip()
        if not name:
            raise ConfigError('--header is not understood: write NAME=VALUE, or "NAME: VALUE"')
        if name.lower() in (given.lower() for given in headers):
            raise ConfigError(f"--header {name} is given twice; give it once")
        headers[name] = value.strip()
    return headers


def read_adapters(options: list[str]) -> dict[str, str]:
    """NAME=PATH, each once -> paths by name. Raises: ConfigError."""
    adapters: dict[str, str] = {}
    for option in options:
        name, _, path = option.partition("=")
        if not name or name in adapters or not (Path(path) / "adapter_config.json").is_file():
            raise ConfigError(
                f"--lora {option} is not understood: write NAME=PATH, each name once, where PATH is a directory "
                "with an adapter_config.json"
            )
        adapters[name] = path
    return adapters


def parse_argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE of --vllm-arg; the value is JSON, or else taken as text. Raises: ConfigError."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise ConfigError(f"--vllm-arg {name} is not understood: write NAME=VALUE, such as tensor_parallel_size=2")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value

"""Limits of an engine in this process: what the user leaves open follows from the machine and the model."""

from __future__ import annotations

import os
from dataclasses import replace

from blendserve.config import BLOCK_SIZE, EngineConfig
from blendserve.errors import CapacityError, ConfigError
from blendserve.host import available_memory_bytes, usable_cores
from blendserve.models.spec import ModelSpec

MAX_KV_SHARE = 0.5
"""Share of the available memory that the KV cache takes unless told otherwise; the rest is for weights and the user."""

MAX_THREADS_PER_CORE = 4
MIN_MAX_THREADS = 64
"""More threads than cores wait for each other at every op; thousands of them stand still."""


def resolve_limits(config: EngineConfig, spec: ModelSpec) -> EngineConfig:
    """Fill the limits that were left open: KV memory, context length, threads.

    Raises: ConfigError when the context asked for is longer than the model's or the threads are far more than the
    machine has cores, CapacityError when not one block fits.
    """
    most_threads = max(MIN_MAX_THREADS, MAX_THREADS_PER_CORE * (os.cpu_count() or 1))
    if config.num_threads > most_threads:
        raise ConfigError(
            f"num_threads is {config.num_threads}, but this machine has {os.cpu_count()} cores and takes at most "
            f"{most_threads} threads; lower --threads, or leave it out"
        )
    if config.max_model_len > spec.max_position:
        most = f"was made for {spec.max_position} tokens"
        if spec.context_limit:
            most = f"can use {spec.max_position} tokens here: {spec.context_limit}"
        raise ConfigError(f"max_model_len is {config.max_model_len}, but {spec.name} {most}; lower it, or leave it out")
    max_model_len = config.max_model_len or spec.max_position
    bytes_per_token = spec.kv_bytes_per_token(config.kv_dtype)
    kv_memory_bytes = config.kv_memory_bytes or min(
        int(available_memory_bytes() * MAX_KV_SHARE * config.memory_share),
        config.max_num_seqs * max_model_len * bytes_per_token,
    )
    if kv_memory_bytes < bytes_per_token * BLOCK_SIZE:
        raise CapacityError(
            f"KV memory is {kv_memory_bytes} bytes; one block of {BLOCK_SIZE} tokens of {spec.name} takes "
            f"{bytes_per_token * BLOCK_SIZE}; raise --kv-memory"
        )
    return replace(
        config,
        kv_memory_bytes=kv_memory_bytes,
        max_model_len=max_model_len,
        num_threads=config.num_threads or usable_cores(),
    )

"""Settings of an engine as one frozen value; the command line and `LLM` both build it."""

from __future__ import annotations

from dataclasses import dataclass

from blendserve.errors import ConfigError

BLOCK_SIZE = 16
"""Tokens in one KV block: the layout of csrc/kv_cache depends on it."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. `kv_memory_bytes=0` and `num_threads=0` mean: decide from the machine.

    Raises: ConfigError when a limit is not positive.
    """

    kv_memory_bytes: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 0
    num_threads: int = 0
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        for name in ("kv_memory_bytes", "max_model_len", "num_threads"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"{name} is {value}; it must be 0 (decide from the machine) or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, below max_num_seqs {self.max_num_seqs}: "
                "every running sequence decodes one token per step; raise the first or lower the second"
            )

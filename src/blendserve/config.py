"""Settings of an engine as one frozen value; the command line and `LLM` both build it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, get_args

from blendserve.errors import ConfigError

Dtype = Literal["bf16", "int8"]
"""Of weights: bfloat16, or 8-bit integers that 8-bit activations are multiplied by."""

DTYPES: tuple[Dtype, ...] = get_args(Dtype)

KvDtype = Literal["bf16", "int8"]
"""Of keys and values: bfloat16, or 8-bit integers with a scale for each token and head (csrc/kv_cache.h)."""

KV_DTYPES: tuple[KvDtype, ...] = get_args(KvDtype)

BYTES_PER_WEIGHT: dict[Dtype, int] = {"bf16": 2, "int8": 1}

BLOCK_SIZE = 16
"""Tokens in one KV block: the layout of csrc/kv_cache depends on it."""

OVERLAP_MODES = ("auto", "on", "off")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine, and the precision of its weights and of its KV cache.

    0 for `kv_memory_bytes`, `max_model_len` or `num_threads` means: decide from the machine and the model. The engine
    takes `memory_share` of the machine's memory; other engines may run beside it. `overlap`: run matrix products and
    attention of a step side by side where the calibration says that it saves time ("auto"), wherever it can be done
    ("on"), or never ("off").
    Raises: ConfigError when a limit is not positive, or `dtype`, `kv_dtype` or the mode of overlap is
    unknown.
    """

    kv_memory_bytes: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 0
    num_threads: int = 0
    enable_prefix_caching: bool = True
    overlap: str = "auto"
    dtype: Dtype = "bf16"
    kv_dtype: KvDtype = "bf16"
    memory_share: float = 1.0

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAP_MODES:
            raise ConfigError(f"overlap is {self.overlap!r}; it must be one of {', '.join(OVERLAP_MODES)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.kv_dtype not in KV_DTYPES:
            raise ConfigError(f"kv_dtype is {self.kv_dtype!r}; it must be one of {', '.join(KV_DTYPES)}")
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        for name in ("kv_memory_bytes", "max_model_len", "num_threads"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"{name} is {value}; it must be 0 (decide from the machine) or more")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(f"memory_share is {self.memory_share}; it must be above 0 and at most 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, below max_num_seqs {self.max_num_seqs}: "
                "every running sequence decodes one token per step; raise the first or lower the second"
            )


_BYTES_BY_UNIT = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_bytes(text: str) -> int:
    """Read a size such as "512MiB", "2G" or "1073741824". Units: bytes. Raises: ConfigError when it is not one."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(
            f"size {text!r} is not understood; write a number with an optional unit, such as 512MiB or 2GB"
        )
    return int(Decimal(match.group(1)) * _BYTES_BY_UNIT[(match.group(2) or "").lower()])

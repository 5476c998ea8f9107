"""Settings of an engine as one frozen value; the command line and `LLM` both build it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal, get_args

from blendserve.errors import ConfigError

Dtype = Literal["bf16", "int8"]
"""Of weights: bfloat16, or 8-bit integers that 8-bit activations are multiplied by. KV is bfloat16 with either."""

DTYPES: tuple[Dtype, ...] = get_args(Dtype)

BYTES_PER_WEIGHT: dict[Dtype, int] = {"bf16": 2, "int8": 1}

BLOCK_SIZE = 16
"""Tokens in one KV block: the layout of csrc/kv_cache depends on it."""

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of a container; absent elsewhere."""


OVERLAP_MODES = ("auto", "on", "off")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine, and the precision of its weights. `kv_memory_bytes=0` and `num_threads=0` mean: decide from
    the machine, of whose memory `memory_share` is for this engine: others may run beside it.

    `overlap`: run matrix products and attention of a step side by side where calibration says that it pays ("auto"),
    wherever it can be done ("on"), or never ("off").
    Raises: ConfigError when a limit is not positive, or `dtype` or the mode of overlap is unknown.
    """

    kv_memory_bytes: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 0
    num_threads: int = 0
    enable_prefix_caching: bool = True
    overlap: str = "auto"
    dtype: Dtype = "bf16"
    memory_share: float = 1.0

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAP_MODES:
            raise ConfigError(f"overlap is {self.overlap!r}; it must be one of {', '.join(OVERLAP_MODES)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
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


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Cores that this process may run on, within the control group's share of time: `docker --cpus 2` means 2."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota, period = _first_words(cgroups / "cpu.max")  # version 2
    if not quota:
        quota, period = _number(cgroups / "cpu/cpu.cfs_quota_us"), _number(cgroups / "cpu/cpu.cfs_period_us")
    return max(1, min(cores, -(-quota // period))) if quota > 0 and period > 0 else cores


def available_memory_bytes(cgroups: Path = CGROUPS) -> int:
    """Memory that can be taken without swapping: the kernel's estimate, within the control group's limit."""
    available = _meminfo_available_bytes()
    for limit_name, used_name, stat_name, cache_field in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        if limit := _number(cgroups / limit_name):
            cached = _number(cgroups / stat_name, cache_field)  # files that the kernel drops when memory is asked for
            available = min(available, limit - _number(cgroups / used_name) + cached)
    return max(0, available)


def _first_words(path: Path) -> tuple[int, int]:
    """Two numbers of a control file's one line; zeros where it is absent or sets no limit."""
    try:
        first, second = path.read_text().split()
        return int(first), int(second)
    except (OSError, ValueError):
        return 0, 0


def _number(path: Path, field: str = "") -> int:
    """The number in a control file, or behind `field` on a line of its own; 0 where there is none ("max", say)."""
    try:
        for line in path.read_text().splitlines():
            *name, value = line.split()
            if name == ([field] if field else []):
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _meminfo_available_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cache_dir() -> Path:
    """Where models and calibrations are kept: BLENDSERVE_CACHE, else blendserve in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("BLENDSERVE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blendserve"

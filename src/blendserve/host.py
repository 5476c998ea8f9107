"""What the operating system says of this machine and this process: cores, memory, control groups, the cache directory,
age. Linux."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of a container; absent elsewhere."""

_START_FIELD = 19  # of /proc/self/stat after the process's name, in clock ticks since the machine started


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


def process_age_s(stat: Path = Path("/proc/self/stat")) -> float | None:
    """Seconds since this process was started, to a hundredth; None where the system does not say."""
    try:
        fields = stat.read_text().rpartition(")")[2].split()
        started_s = int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    except (OSError, ValueError, IndexError):
        return None


def peak_rss_bytes() -> int:
    """The most memory that was resident at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""What the operating system says of this process: how old it is, and the most memory it has had. Linux."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

_START_FIELD = 19  # of /proc/self/stat after the process's name, in clock ticks since the machine started


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

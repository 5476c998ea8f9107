"""What every benchmark prints beside its figures: command, machine, commit, medians with their spread, tables.

Standard library only, so that scripts which run in another environment can use it too.
"""

from __future__ import annotations

import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The extensions that decide which kernels run; everything else in cpuinfo is noise here.
ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware a figure was measured on."""

    cpu: str
    num_cores: int
    isa_flags: tuple[str, ...]
    l2_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.num_cores} cores, {' '.join(self.isa_flags) or 'no known vector extension'}, "
            f"L2 {self.l2_bytes // 1024} KiB per core, {self.memory_bytes / 1e9:.0f} GB"
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """The median of repeated measurements and their range."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 0) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}..{self.high:.{digits}f})"


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU seconds of the whole machine since it started; differences say how busy the neighbours were."""

    busy_s: float
    stolen_s: float

    def __sub__(self, earlier: CpuUse) -> CpuUse:
        return CpuUse(self.busy_s - earlier.busy_s, self.stolen_s - earlier.stolen_s)


def summarise(values: Sequence[float]) -> Summary:
    return Summary(statistics.median(values), min(values), max(values))


def machine() -> Machine:
    cpuinfo = _cpuinfo()
    model = cpuinfo.get("model name", platform.processor() or platform.machine())
    if "cpu family" in cpuinfo:  # some hypervisors hide the marketing name: family and model still tell the core
        model += f" (family {cpuinfo['cpu family']} model {cpuinfo['model']})"
    flags = set(cpuinfo.get("flags", cpuinfo.get("Features", "")).split())
    return Machine(
        cpu=model,
        num_cores=len(os.sched_getaffinity(0)),
        isa_flags=tuple(flag for flag in ISA_FLAGS if flag in flags),
        l2_bytes=_l2_bytes(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def commit() -> str:
    """The commit of the working tree, marked where tracked files differ from it."""
    revision = _git("rev-parse", "--short=10", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return f"{revision or 'unknown'}{' with uncommitted changes' if changes else ''}"


def print_header() -> None:
    """Print what a reader needs to repeat the run."""
    command = shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    print(f"command: {command}")
    print(f"machine: {machine()}")
    print(f"commit:  {commit()}")
    print(
        f"date:    {time.strftime('%Y-%m-%d %H:%M')}, load average {os.getloadavg()[0]:.1f} at the start\n", flush=True
    )


def cpu_use() -> CpuUse:
    """Read /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal in clock ticks."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    user, nice, system, _idle, _iowait, irq, softirq, stolen = ticks
    return CpuUse((user + nice + system + irq + softirq) / ticks_per_s, stolen / ticks_per_s)


class Watch:
    """Watches the machine from its making on: what share of it did others than this process and its ended children
    take?"""

    def __init__(self) -> None:
        self._began_s, self._use, self._own_s = time.perf_counter(), cpu_use(), _own_cpu_s()

    def others(self) -> float:
        used, elapsed_s = cpu_use() - self._use, time.perf_counter() - self._began_s
        others_s = used.busy_s + used.stolen_s - (_own_cpu_s() - self._own_s)
        return max(0.0, others_s) / (elapsed_s * (os.cpu_count() or 1))


def _own_cpu_s() -> float:
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table: the first column left, the others right aligned, padded to read well in a terminal."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (f"{cells[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(cells[1:], widths[1:], strict=True)))
        return "| " + " | ".join((first, *rest)) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join((line(header), rule, *(line(row) for row in rows)))


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    text = path.read_text().split("\n\n", 1)[0] if path.exists() else ""
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _l2_bytes() -> int:
    path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    return int(path.read_text().strip().rstrip("K")) * 1024 if path.exists() else 0


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()

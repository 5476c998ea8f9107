"""What a machine could compute at most, for the share that an engine reaches of it."""

from __future__ import annotations

from dataclasses import dataclass

from common import Machine, machine

from blendserve.costs.stored_calibration import load_calibration
from blendserve.errors import ConfigError
from blendserve.host import cache_dir

PER_CORE = {"family 25 model 17": (236e9, 472e9)}
"""Flop/s in bf16 and operations/s in int8 of a loop that only multiplies, by processor (docs/benchmarks.md)."""


@dataclass(frozen=True, slots=True)
class Peak:
    """Operations per second of all cores. `source` says where the two numbers are from."""

    bf16: float
    int8: float
    source: str

    def share(self, operations_per_s: float, precision: str) -> str:
        """As text: of the int8 peak where the engine's precision is called int8, else of that of bf16."""
        peak = self.int8 if precision == "int8" else self.bf16
        return f"{operations_per_s / peak:.0%}" if peak else ""


def peak_of(here: Machine | None = None) -> Peak:
    """This machine's: known for its processor, or the highest rates that `blendserve calibrate` stored; zeros where
    there are none."""
    here = here or machine()
    for name, (bf16, int8) in PER_CORE.items():
        if name in here.cpu:
            return Peak(bf16 * here.num_cores, int8 * here.num_cores, "a loop that only multiplies, all cores")
    rates = []
    for dtype in ("bf16", "int8"):
        try:
            rates.append(load_calibration(cache_dir(), dtype).peaks().flop_per_s)
        except ConfigError:
            rates.append(0.0)
    return Peak(rates[0], rates[1], "the best matrix product of `blendserve calibrate`")

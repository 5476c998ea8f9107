"""What a run on the native engine measured of itself: the common ground of its trace file and its page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from blendserve.costs.hardware import Peaks
from blendserve.engine.stats import RunStats
from blendserve.executors.trace import StepTrace

if TYPE_CHECKING:
    from blendserve.executors.native import NativeCounters  # needs the compiled core, which reports do without

Floats = NDArray[np.float64]

MATMUL_OPS = frozenset(("qkv", "output", "gate_up", "down", "head"))


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A finished run, or the part of one that was interrupted. `optimal_sharing` is None where no plan was made of the
    whole file. `op_names` names the ops of the trace."""

    source: str
    model: str
    policy: str
    machine: str
    num_threads: int
    isa: str
    peaks: Peaks
    stats: RunStats
    counters: NativeCounters
    trace: StepTrace
    op_names: tuple[str, ...]
    optimal_sharing: float | None = None

    @property
    def num_steps(self) -> int:
        return min(len(self.trace), self.stats.num_steps)

    @property
    def start_s(self) -> float:
        """When the first step began, by the clock of the trace."""
        return self.trace.first_begin_s if len(self.trace) else 0.0

    @property
    def elapsed_s(self) -> float:
        """From the beginning of the first step to the end of the last."""
        return float(self.trace.end_s[self.num_steps - 1]) - self.start_s if self.num_steps else 0.0

    @property
    def compute_share(self) -> float:
        """Mean share of the peak rate of arithmetic, whatever happened between steps included."""
        return float(self.steps()["compute_s"].sum()) / self.elapsed_s if self.num_steps else 0.0

    @property
    def memory_share(self) -> float:
        """Mean share of the peak rate of memory."""
        return float(self.steps()["memory_s"].sum()) / self.elapsed_s if self.num_steps else 0.0

    def steps(self) -> dict[str, Floats]:
        """The step log on the wall clock: a step lasts from the end of the one before it to its own."""
        columns = {name: values[: self.num_steps] for name, values in self.stats.steps.columns().items()}
        end_s = self.trace.end_s[: self.num_steps] - self.start_s
        return {**columns, "end_s": end_s, "elapsed_s": np.diff(end_s, prepend=0.0)}

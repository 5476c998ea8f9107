"""What a run did and where its time went: totals, and one row of numbers per step for timelines."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

STEP_COLUMNS = (
    "end_s",
    "elapsed_s",
    "compute_s",
    "memory_s",
    "num_prefill_tokens",
    "num_decode_tokens",
    "num_kv_tokens",
    "num_running",
)
"""Columns of `StepLog`: `end_s` is executor time since the start of the run, `num_kv_tokens` counts whole blocks."""


class StepLog:
    """One row of `STEP_COLUMNS` per step, 64 bytes each."""

    def __init__(self) -> None:
        self._values = array("d")

    def __len__(self) -> int:
        return len(self._values) // len(STEP_COLUMNS)

    def append(self, row: tuple[float, float, float, float, int, int, int, int]) -> None:
        """Add one row in the order of STEP_COLUMNS."""
        self._values.extend(row)

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """A copy of every column. Shapes: [number of steps]."""
        values = np.array(self._values).reshape(-1, len(STEP_COLUMNS))
        return {name: np.ascontiguousarray(values[:, index]) for index, name in enumerate(STEP_COLUMNS)}


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run took of its process. `kv_bytes` are reserved, and occupied as far as they were used; `startup_s` is
    from the start of the process to that of the first step, None where none ran or the system does not say."""

    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    peak_rss_bytes: int
    startup_s: float | None


@dataclass(slots=True)
class RunStats:
    """Totals of one run. Units: tokens, seconds.

    `executor_s` adds up what steps took by the executor's clock (virtual in simulations, where it is the makespan);
    `scheduling_s` is the wall clock of everything else the loop does, `scheduling_s_by_step` its part around every
    step. `num_prefill_tokens` counts computed prompt tokens and what preemptions made it compute again;
    `num_prompt_tokens` and `num_output_tokens` are those of finished requests. `resources` are known where the engine
    is part of this process. `num_constrained` requests followed `num_grammars` grammars, which took `grammar_compile_s`
    to compile; masks were filled for `grammar_mask_s`, some beside forward passes, and grammars held
    sampling up for `grammar_wait_s`. `calibration` names the effort of the machine's calibration; None where there was
    none.
    """

    capacity_tokens: int
    num_steps: int = 0
    executor_s: float = 0.0
    scheduling_s: float = 0.0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_admissions: int = 0
    num_admitted_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    max_running: int = 0
    max_kv_tokens: int = 0
    scheduling_s_by_step: array[float] = field(default_factory=lambda: array("d"))
    steps: StepLog = field(default_factory=StepLog)
    num_constrained: int = 0
    num_grammars: int = 0
    grammar_compile_s: float = 0.0
    grammar_mask_s: float = 0.0
    grammar_wait_s: float = 0.0
    resources: Resources | None = None
    calibration: str | None = None

    @property
    def makespan_s(self) -> float:
        """Executor and scheduling time; what the consumer of the outputs does in between is not in it."""
        return self.executor_s + self.scheduling_s

    @property
    def scheduling_share(self) -> float:
        """Part of the makespan in which no step ran; meaningful where the executor's clock is the wall."""
        return self.scheduling_s / self.makespan_s if self.makespan_s > 0 else 0.0

    @property
    def mean_scheduling_s(self) -> float:
        """Scheduling per step."""
        return self.scheduling_s / self.num_steps if self.num_steps else 0.0

    @property
    def p99_scheduling_s(self) -> float:
        """What 99 of 100 steps stay within: the least scheduling time of the slowest hundredth of the steps."""
        times = np.frombuffer(self.scheduling_s_by_step)
        return float(np.percentile(times, 99, method="higher")) if len(times) else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Part of the tokens brought in by admissions that the prefix cache already had (or was about to have)."""
        return self.num_cached_tokens / self.num_admitted_tokens if self.num_admitted_tokens else 0.0

    @property
    def balance(self) -> float:
        """How far every step mixes the two resources as the whole run does: 1 where all do, 0 where none uses both.

        The sum over steps of the lesser of the step's parts of all compute and of all memory work; 0 where the executor
        does not tell them apart.
        """
        steps = self.steps.columns()
        compute, memory = steps["compute_s"], steps["memory_s"]
        if not compute.sum() or not memory.sum():
            return 0.0
        return float(np.minimum(compute / compute.sum(), memory / memory.sum()).sum())

    def add_scheduling(self, seconds: float, *, has_step: bool) -> None:
        """Count what the loop did around one step, or what it did without one."""
        self.scheduling_s += seconds
        if has_step:
            self.scheduling_s_by_step.append(seconds)

    def add_step(
        self,
        *,
        elapsed_s: float,
        compute_s: float,
        memory_s: float,
        num_prefill_tokens: int,
        num_decode_tokens: int,
        num_kv_tokens: int,
        num_running: int,
    ) -> None:
        """Count one executed step."""
        self.num_steps += 1
        self.executor_s += elapsed_s
        self.num_prefill_tokens += num_prefill_tokens
        self.num_decode_tokens += num_decode_tokens
        self.max_running = max(self.max_running, num_running)
        self.max_kv_tokens = max(self.max_kv_tokens, num_kv_tokens)
        self.steps.append(
            (
                self.executor_s,
                elapsed_s,
                compute_s,
                memory_s,
                num_prefill_tokens,
                num_decode_tokens,
                num_kv_tokens,
                num_running,
            )
        )

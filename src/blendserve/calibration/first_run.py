"""The first long run on a machine measures it, so that plans and overlap fit without `blendserve calibrate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from blendserve.calibration.measure import FIRST_RUN, calibrate
from blendserve.calibration.step_probe import Clock
from blendserve.config import EngineConfig
from blendserve.costs.model_cost import CostModel
from blendserve.costs.stored_calibration import (
    Calibration,
    calibration_path,
    is_replaceable,
    matching_calibration,
)
from blendserve.errors import BlendServeError, ConfigError
from blendserve.planner.base import RequestTable
from blendserve.planner.survival import PRIOR_SCALE_TOKENS

LEAST_WORK_S = 60.0
"""Shorter work would not win back the seconds that measuring takes."""

Measure = Callable[[EngineConfig], Calibration]


def measure_first_run(config: EngineConfig, clock: Clock = time.perf_counter) -> Calibration:
    """This machine as the engine of `config` uses it, in about `FIRST_RUN.total_s`."""
    return calibrate(
        config.num_threads, FIRST_RUN, dtype=config.dtype, kv_dtype=config.kv_dtype, clock=clock
    ).calibration


def calibrate_first_run(
    config: EngineConfig,
    expected_s: Callable[[], float],
    cache_directory: Path,
    notify: Callable[[str], None],
    *,
    measure: Measure = measure_first_run,
) -> Calibration | None:
    """Measure this machine and store the result, where nothing that fits is stored and at least `LEAST_WORK_S` of work
    is expected. Returns what was measured, or None.

    Call it when the weights are loaded and no step has run: beside loading it would measure the loading. Engines that
    share the machine with others (`memory_share`) measure nothing: they would measure each other. `config` has resolved
    limits. What goes wrong is told to `notify`; the run goes on without.
    """
    if config.memory_share < 1 or matching_calibration(
        cache_directory, config.num_threads, lambda _: None, config.dtype, config.kv_dtype
    ):
        return None
    if expected_s() < LEAST_WORK_S:
        return None
    notify(
        f"measuring this machine for about {FIRST_RUN.total_s:.0f} s (matrix products, memory and attention, "
        f"{config.dtype} weights, {config.kv_dtype} KV, {config.num_threads} threads), once: plans and overlap need it"
    )
    try:
        measured = measure(config)
    except BlendServeError as error:
        notify(f"built-in rates are used: this machine could not be measured: {error}")
        return None
    notify(_store(measured, cache_directory))
    return measured


def _store(measured: Calibration, cache_directory: Path) -> str:
    """Store it unless that would replace a better one. Returns what became of it."""
    path = calibration_path(cache_directory, measured.dtype, measured.kv_dtype)
    if not is_replaceable(cache_directory, measured.dtype, measured.kv_dtype):
        return f"used for this run only: {path} was made by `blendserve calibrate` for other threads or another machine"
    try:
        measured.save(cache_directory)
    except ConfigError as error:
        return f"used for this run only: {error}"
    options = f"--dtype {measured.dtype} --kv-dtype {measured.kv_dtype}"
    return f"stored in {path}; `blendserve calibrate {options}` measures more exactly"


def expected_work_s(cost: CostModel, table: RequestTable, num_shared_tokens: int) -> float:
    """About how long requests take one after the other; `num_shared_tokens` of their prompts are computed for
    others."""
    unknown = np.minimum(np.maximum(table.max_output_tokens, 1), PRIOR_SCALE_TOKENS)
    outputs = np.where(table.known_output_tokens >= 0, table.known_output_tokens, unknown)
    work = cost.total(table.num_prompt_tokens, outputs, num_shared_tokens)
    return work.remaining_compute_s + work.memory_s

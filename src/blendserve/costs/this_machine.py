"""What this machine does per second: as calibrated, else a built-in guess."""

from __future__ import annotations

from collections.abc import Callable

from blendserve.config import BYTES_PER_WEIGHT, Dtype, KvDtype
from blendserve.costs.hardware import Peaks
from blendserve.costs.model_cost import CostModel, ModelCost
from blendserve.costs.step_cost import OverlapCost
from blendserve.costs.stored_calibration import Calibration, matching_calibration
from blendserve.host import cache_dir
from blendserve.models.spec import ModelSpec

# One core with 256-bit vectors, until the machine is calibrated: only the ratio of the two matters to a plan.
_FLOP_PER_S_PER_CORE: dict[Dtype, float] = {"bf16": 90e9, "int8": 160e9}
_BYTES_PER_S_PER_CORE = 12e9


def peaks_of(num_threads: int, dtype: Dtype = "bf16", kv_dtype: KvDtype = "bf16") -> Peaks:
    """What this machine delivers at most: as calibrated, else a built-in guess. A calibration that cannot be used is
    silently none: `cost_of` tells."""
    calibration = matching_calibration(cache_dir(), num_threads, lambda _: None, dtype, kv_dtype)
    if calibration is not None:
        return calibration.peaks()
    return Peaks(_FLOP_PER_S_PER_CORE[dtype] * num_threads, _BYTES_PER_S_PER_CORE * num_threads, is_measured=False)


def overlap_cost_of(num_threads: int, dtype: Dtype = "bf16", kv_dtype: KvDtype = "bf16") -> OverlapCost | None:
    """When and how steps overlap on this machine, as calibrated; None where that was not measured, or not on so many
    threads: `cost_of` tells."""
    calibration = matching_calibration(cache_dir(), num_threads, lambda _: None, dtype, kv_dtype)
    return None if calibration is None else calibration.overlap_cost()


def cost_of(
    spec: ModelSpec,
    num_threads: int,
    notify: Callable[[str], None],
    dtype: Dtype = "bf16",
    kv_dtype: KvDtype = "bf16",
    calibration: Calibration | None = None,
    overlap: str = "auto",
) -> CostModel:
    """Compute and memory seconds of requests of this model on this machine: as calibrated, else of the built-in ratio
    and without overlap. `calibration` goes before the stored one; `overlap` is the engine's mode.

    A stored calibration that cannot be used is told to `notify`.
    """
    model = ModelCost.from_spec(spec, bytes_per_weight=BYTES_PER_WEIGHT[dtype], kv_dtype=kv_dtype)
    calibration = calibration or matching_calibration(cache_dir(), num_threads, notify, dtype, kv_dtype)
    if calibration is not None:
        return calibration.step_cost(model, overlap).cost_model()
    return built_in_cost(spec, num_threads, dtype, kv_dtype)


def built_in_cost(spec: ModelSpec, num_threads: int, dtype: Dtype = "bf16", kv_dtype: KvDtype = "bf16") -> CostModel:
    """Costs at the built-in rates, without overlap."""
    return CostModel.at_rates(
        ModelCost.from_spec(spec, bytes_per_weight=BYTES_PER_WEIGHT[dtype], kv_dtype=kv_dtype),
        flop_per_s=_FLOP_PER_S_PER_CORE[dtype] * num_threads,
        bytes_per_s=_BYTES_PER_S_PER_CORE * num_threads,
        has_overlap=False,
    )

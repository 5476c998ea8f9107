"""Hardware as frozen numbers with sources: datasheets, and how much of a device a model leaves for KV."""

from __future__ import annotations

from dataclasses import dataclass

from blendserve.costs.model_cost import CostModel, ModelCost
from blendserve.errors import CapacityError, ConfigError


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """One device as its datasheet states it: dense bf16 peak, memory bandwidth and size, board power. Price is the
    user's."""

    name: str
    flop_per_s: float
    bytes_per_s: float
    memory_bytes: float
    watts: float = 0.0
    price_per_hour: float = 0.0


# Datasheets quote bf16 with 2:4 sparsity for L4, H100, H200 and B200; half of that is the dense peak.
A100_80G = HardwareSpec("a100-80g", 312e12, 2.039e12, 80e9, 400)  # NVIDIA A100 datasheet, SXM4 80GB
H100 = HardwareSpec("h100", 989.5e12, 3.35e12, 80e9, 700)  # NVIDIA H100 datasheet, SXM5: 1,979 sparse
H200 = HardwareSpec("h200", 989.5e12, 4.8e12, 141e9, 700)  # NVIDIA H200 datasheet, SXM: 1,979 sparse
L4 = HardwareSpec("l4", 121e12, 0.3e12, 24e9, 72)  # NVIDIA L4 datasheet: 242 sparse
B200 = HardwareSpec("b200", 2250e12, 8e12, 180e9, 1000)  # NVIDIA DGX B200 datasheet / 8: 36 PFLOP/s sparse, 64 TB/s
_USABLE_MEMORY = 0.95  # leaves 60 GB of KV beside Llama-3-8B on an A100, as the paper has it
HARDWARE_BY_NAME = {spec.name: spec for spec in (A100_80G, H100, H200, L4, B200)}


def known_hardware(name: str) -> HardwareSpec:
    """A device by name. Raises: ConfigError with the names that exist."""
    if name not in HARDWARE_BY_NAME:
        raise ConfigError(f"unknown hardware {name!r}; known: {', '.join(HARDWARE_BY_NAME)}")
    return HARDWARE_BY_NAME[name]


@dataclass(frozen=True, slots=True)
class Peaks:
    """The most that this machine computes and reads per second; `is_measured` by calibration, else a built-in guess."""

    flop_per_s: float
    bytes_per_s: float
    is_measured: bool


def peak_cost_model(
    model: ModelCost, hardware: HardwareSpec, *, tensor_parallel: int = 1, has_prefill_attention: bool = False
) -> CostModel:
    """The paper's density model: datasheet peaks, all parameters, nothing calibrated."""
    check_tensor_parallel(tensor_parallel)
    return CostModel.at_rates(
        model,
        flop_per_s=hardware.flop_per_s * tensor_parallel,
        bytes_per_s=hardware.bytes_per_s * tensor_parallel,
        has_prefill_attention=has_prefill_attention,
    )


def kv_capacity_bytes(model: ModelCost, hardware: HardwareSpec, *, tensor_parallel: int = 1) -> float:
    """Bytes left for KV beside weights and workspace, over all ranks. Raises: CapacityError when weights do not fit."""
    check_tensor_parallel(tensor_parallel)
    usable = hardware.memory_bytes * _USABLE_MEMORY * tensor_parallel
    if usable <= model.weight_bytes:
        raise CapacityError(
            f"{model.name} has {model.weight_bytes / 1e9:.0f} GB of weights; {tensor_parallel} x {hardware.name} "
            f"offers {usable / 1e9:.0f} GB: raise --tensor-parallel, or choose other --hardware"
        )
    return usable - model.weight_bytes


def check_tensor_parallel(tensor_parallel: int) -> None:
    """Raises: ConfigError when the degree is not positive."""
    if tensor_parallel < 1:
        raise ConfigError(f"--tensor-parallel is {tensor_parallel}; it must be at least 1")

"""One replica on a machine, as simulations see it: a GPU by its datasheet, or this machine as it was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from blendserve.config import BLOCK_SIZE, BYTES_PER_WEIGHT, Dtype, EngineConfig, KvDtype
from blendserve.costs.hardware import HardwareSpec, kv_capacity_bytes
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import NANOFLOW, SEQUENTIAL, Interference, StepCost, gpu_step_cost
from blendserve.costs.stored_calibration import calibration_path, load_calibration
from blendserve.engine.limits import resolve_limits
from blendserve.errors import CapacityError, ConfigError
from blendserve.host import cache_dir
from blendserve.models.spec import ModelSpec

EngineKind = Literal["overlapped", "sequential"]
ENGINE_KINDS: tuple[EngineKind, ...] = get_args(EngineKind)
INTERFERENCE_BY_ENGINE = {"overlapped": NANOFLOW, "sequential": SEQUENTIAL}


@dataclass(frozen=True, slots=True)
class Machine:
    """One replica: its step cost, the KV tokens it holds, and the limits of a step (NanoFlow's dense batch of 2048).

    `overlap` is how well the hardware overlaps at its best, which bounds rest on; `cost.interference` is the engine's.
    """

    hardware: HardwareSpec
    model: ModelCost
    tensor_parallel: int
    cost: StepCost
    capacity_tokens: int
    overlap: Interference = NANOFLOW
    max_num_seqs: int = 2048
    max_num_batched_tokens: int = 2048

    def shrunk(self, factor: float) -> Machine:
        """The same machine with `factor` of its KV memory, step constants and batch: small jobs keep large ones' shape.

        A job of factor^2 of the requests, with videos of factor of the length, has `factor` of the steps, and the same
        ratio of its longest request to all steps. Rates per token stay.
        """
        cost = replace(
            self.cost,
            weight_floor_s=self.cost.weight_floor_s * factor,
            constant_s=self.cost.constant_s * factor,
            extra_points=tuple((count * factor, seconds * factor) for count, seconds in self.cost.extra_points),
        )
        return replace(
            self,
            cost=cost,
            capacity_tokens=int(self.capacity_tokens * factor),
            max_num_seqs=max(16, int(self.max_num_seqs * factor)),
            max_num_batched_tokens=max(16, int(self.max_num_batched_tokens * factor)),
        )


def gpu_machine(
    hardware: HardwareSpec,
    spec: ModelSpec | ModelCost,
    *,
    engine: EngineKind = "overlapped",
    tensor_parallel: int = 1,
    has_prefill_attention: bool = False,
    kv_dtype: KvDtype = "bf16",
) -> Machine:
    """A replica of a model on GPUs. `kv_dtype`: of keys and values, where `spec` is a model's shape.

    Raises: ConfigError for an unknown engine kind; CapacityError when weights do not fit.
    """
    if engine not in INTERFERENCE_BY_ENGINE:
        raise ConfigError(f"unknown engine kind {engine!r}; known: {', '.join(INTERFERENCE_BY_ENGINE)}")
    model = spec if isinstance(spec, ModelCost) else ModelCost.from_spec(spec, kv_dtype=kv_dtype)
    cost = gpu_step_cost(
        model,
        hardware,
        tensor_parallel=tensor_parallel,
        interference=INTERFERENCE_BY_ENGINE[engine],
        has_prefill_attention=has_prefill_attention,
    )
    capacity = kv_capacity_bytes(model, hardware, tensor_parallel=tensor_parallel)
    return Machine(hardware, model, tensor_parallel, cost, int(capacity / model.kv_bytes_per_token))


def is_calibrated(dtype: Dtype = "bf16", kv_dtype: KvDtype = "bf16") -> bool:
    """Is there a calibration of this machine for weights and KV of these dtypes?"""
    return calibration_path(cache_dir(), dtype, kv_dtype).is_file()


def this_machine(spec: ModelSpec, engine: EngineKind = "overlapped", config: EngineConfig | None = None) -> Machine:
    """The machine as it was measured, with the limits that a run with `config` has; the same that are left open.

    Raises: ConfigError when there is no calibration of the dtype and the threads asked for; CapacityError when the
    weights or one KV block do not fit.
    """
    config = config or EngineConfig()
    calibration = load_calibration(cache_dir(), config.dtype, config.kv_dtype)
    if config.num_threads not in (0, calibration.num_threads):
        raise ConfigError(
            f"--threads is {config.num_threads}, and the calibration is of {calibration.num_threads}; run `blendserve "
            f"calibrate --threads {config.num_threads} --dtype {config.dtype}`"
        )
    model = ModelCost.from_spec(spec, bytes_per_weight=BYTES_PER_WEIGHT[config.dtype], kv_dtype=config.kv_dtype)
    if calibration.memory_bytes <= model.weight_bytes:
        raise CapacityError(
            f"{spec.name} has {model.weight_bytes / 1e9:.1f} GB of weights, this machine "
            f"{calibration.memory_bytes / 1e9:.1f} GB of memory: name a smaller model or other hardware"
        )
    cost = calibration.step_cost(model, config.overlap)
    limits = resolve_limits(config, spec)
    return Machine(
        hardware=calibration.hardware(),
        model=model,
        tensor_parallel=1,
        cost=replace(cost, interference=SEQUENTIAL) if engine == "sequential" else cost,
        capacity_tokens=limits.kv_memory_bytes // (spec.kv_bytes_per_token() * BLOCK_SIZE) * BLOCK_SIZE,
        overlap=cost.interference,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
    )

"""Hardware as frozen numbers with sources, and the time of one engine step on it (`StepCost`).

The only place where the simulator is calibrated: paper Table 1 (Llama-3-8B on an A100) gives rates as shares of peak,
and those shares are assumed to hold for every GPU, model and degree of tensor parallelism. `Calibration` holds the
same numbers measured on a machine; `blendserve calibrate` writes it.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from blendserve.config import Dtype
from blendserve.cost import CostModel, Floats, ModelCost
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


@dataclass(frozen=True, slots=True)
class Interference:
    """How far compute time c and memory time m of one step hide each other: f(c, m) = max(c + a m, m + b c).

    `compute_delay` is a, `memory_delay` is b: 1 and 1 is a sequential engine (c + m), 0 and 0 perfect overlap (max). f
    is convex and homogeneous, which is what the bounds rest on.
    """

    compute_delay: float
    memory_delay: float

    def __post_init__(self) -> None:
        if not (0 <= self.compute_delay <= 1 and 0 <= self.memory_delay <= 1):
            raise ConfigError(f"interference delays lie in [0, 1]; got {self.compute_delay} and {self.memory_delay}")

    def step_s(self, compute_s: float, memory_s: float) -> float:
        """Elapsed time of one step."""
        return max(compute_s + self.compute_delay * memory_s, memory_s + self.memory_delay * compute_s)

    def steps_s(self, compute_s: Floats, memory_s: Floats) -> Floats:
        """Elapsed time of many steps, aligned arrays."""
        return np.maximum(compute_s + self.compute_delay * memory_s, memory_s + self.memory_delay * compute_s)

    @property
    def hides_time(self) -> bool:
        """Is a step of equal compute and memory time shorter than both by more than measurements scatter?"""
        return self.step_s(1.0, 1.0) < 2.0 * (1.0 - OVERLAP_NOISE)


OVERLAP_NOISE = 0.02
"""Time saved by overlap, as a share, that a calibration cannot tell from none."""
SEQUENTIAL = Interference(1.0, 1.0)
PERFECT = Interference(0.0, 0.0)
# NanoFlow (OSDI 2025) Table 3: attention given 0.4 of the GPU runs at 0.8 of its speed and leaves GEMM 0.6. Until the
# shorter of the two ends both progress at those speeds, then the other runs alone: c + m / 2 or m + c / 3.
NANOFLOW = Interference(1 / 2, 1 / 3)

# Paper Table 1, measured ms per layer of Llama-3-8B on an A100, sequence 1024: GEMM 1.087 and 2.005 at 512 and 1024
# tokens, attention 1.317 at 512 sequences. Hence per layer 0.169 ms + 1.793 us per token, and KV streams at 1.63 TB/s.
_TABLE_1_TOKEN_S = 1.793e-6
_TABLE_1_LAYER_S = 0.169e-3
_TABLE_1_BYTES_PER_S = 1.63e12
_TABLE_1_LAYER_PARAMETERS = 218_103_808
_GEMM_EFFICIENCY = 2 * _TABLE_1_LAYER_PARAMETERS / _TABLE_1_TOKEN_S / A100_80G.flop_per_s  # 0.78
_BANDWIDTH_EFFICIENCY = _TABLE_1_BYTES_PER_S / A100_80G.bytes_per_s  # 0.80
# The constant of a GEMM scales with its weights: as a share of the time that loading them takes.
_CONSTANT_PER_LOAD = _TABLE_1_LAYER_S * _TABLE_1_BYTES_PER_S / (2 * _TABLE_1_LAYER_PARAMETERS)  # 0.63
_USABLE_MEMORY = 0.95  # leaves 60 GB of KV beside Llama-3-8B on an A100, as the paper has it


@dataclass(frozen=True, slots=True)
class StepCost:
    """Time of one engine step: c = max(weight_floor_s, constant_s + token_s n) + head + prefill attention, m = KV
    tokens read, then f(c, m). The head, max(head_floor_s, head_s n'), is for the n' tokens that are sampled; zeros
    leave it out, as Table 1 does.

    Units: seconds; `token_s` per scheduled token, `pair_s` per pair of a prefill token and a token it attends to,
    `kv_token_s` per token of KV that a decode reads. `shared_kv_share` is the part of it that a decode pays for a token
    which another decode of the step reads too: 1 on engines that read a shared prefix for every sequence, as the
    paper's do; less where it is read once. The planner's `CostModel` knows nothing of it: who runs beside whom is not
    known before the run, so its densities count every read.
    """

    weight_floor_s: float
    constant_s: float
    token_s: float
    kv_token_s: float
    pair_s: float = 0.0
    interference: Interference = NANOFLOW
    head_floor_s: float = 0.0
    head_s: float = 0.0
    shared_kv_share: float = 1.0

    def compute_s(self, num_tokens: float, num_pairs: float = 0.0, num_sampled: float = 0.0) -> float:
        """GEMM time of a step of so many tokens, some of them sampled, plus its prefill attention."""
        layers_s = max(self.weight_floor_s, self.constant_s + self.token_s * num_tokens)
        head_s = max(self.head_floor_s, self.head_s * num_sampled) if num_sampled else 0.0
        return layers_s + head_s + self.pair_s * num_pairs

    def memory_s(self, num_kv_tokens: float) -> float:
        """Decode attention time of a step."""
        return self.kv_token_s * num_kv_tokens

    def elapsed_s(
        self, num_tokens: float, num_kv_tokens: float, num_pairs: float = 0.0, num_sampled: float = 0.0
    ) -> float:
        """Time of the whole step."""
        compute_s = self.compute_s(num_tokens, num_pairs, num_sampled)
        return self.interference.step_s(compute_s, self.memory_s(num_kv_tokens))

    def cost_model(self) -> CostModel:
        """The marginal costs of a token, for the planner: what a request adds to a busy step.

        `CostModel` counts all p^2 pairs of a prompt, a step the half that is causal.
        """
        return CostModel(
            token_s=self.token_s,
            kv_token_s=self.kv_token_s,
            pair_s=self.pair_s / 2,
            head_s=self.head_s,
            has_overlap=self.interference.hides_time,
        )


def gpu_step_cost(
    model: ModelCost,
    hardware: HardwareSpec,
    *,
    tensor_parallel: int = 1,
    interference: Interference = NANOFLOW,
    has_prefill_attention: bool = False,
) -> StepCost:
    """Step cost of a model on a GPU: Table 1's shares of peak, peaks multiplied by the degree of tensor parallelism.

    Communication between ranks is left out: overlapped engines hide it. Deviation from the paper: prefill attention is
    causal here (half of its 4 p^2 H L).
    """
    check_tensor_parallel(tensor_parallel)
    flop_per_s = hardware.flop_per_s * _GEMM_EFFICIENCY * tensor_parallel
    bytes_per_s = hardware.bytes_per_s * _BANDWIDTH_EFFICIENCY * tensor_parallel
    matmul_bytes = model.weight_bytes * model.num_matmul_parameters / model.num_parameters
    return StepCost(
        weight_floor_s=model.weight_bytes / bytes_per_s,
        constant_s=_CONSTANT_PER_LOAD * matmul_bytes / bytes_per_s,
        token_s=2 * model.num_matmul_parameters / flop_per_s,
        kv_token_s=model.kv_bytes_per_token / bytes_per_s,
        pair_s=4 * model.attention_width * model.num_layers / flop_per_s if has_prefill_attention else 0.0,
        interference=interference,
    )


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
            f"offers {usable / 1e9:.0f} GB: raise the degree of tensor parallelism"
        )
    return usable - model.weight_bytes


def check_tensor_parallel(tensor_parallel: int) -> None:
    """Raises: ConfigError when the degree is not positive."""
    if tensor_parallel < 1:
        raise ConfigError(f"tensor parallelism is {tensor_parallel}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class OverlapCost:
    """What the native engine needs to know of a machine in order to run a step's matrix products beside its attention:
    rates of all threads, and the three settings that calibration tries. `interference` is that of steps that overlap;
    SEQUENTIAL means that it does not pay. The defaults are those of csrc/overlap.h.

    `chunk_bytes` of KV are fetched beside a matmul tile of `tile_flop`, `step_bytes` per step of its inner loop.
    """

    gemm_flop_per_s: float = 165e9
    attention_flop_per_s: float = 120e9
    kv_bytes_per_s: float = 18e9
    weight_bytes_per_s: float = 20e9
    interference: Interference = SEQUENTIAL
    chunk_bytes: int = 384 << 10
    tile_flop: int = 5_000_000
    step_bytes: int = 48
    memory_lanes: int = 0


_CALIBRATION_FILE = "calibration.json"
# Decode attention of the native engine over 1,024 shared of 1,124 tokens, and over copies of them, 3 query heads of 64
# per KV head, one Zen 3 thread (build/dev/bench_attention): 0.84 and 1.40 ms, 0.125 of both for the 100 of its own.
_NATIVE_SHARED_KV_SHARE = 0.56
_CALIBRATE_AGAIN = "run `blendserve calibrate` again"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rates measured on this machine, as stored in the user's cache, a file for each `dtype` of weights. Rates are
    those of the whole machine.

    `constant_s` is the fixed time of one step; `gemm_points` are (tokens, flop/s), `bandwidth_points` (threads,
    bytes/s), kept so that a reader can check the summary. The delays are those of steps that overlap in each core, and
    `chunk_bytes` to `memory_lanes` the settings they were measured with (`OverlapCost`); delays of 1 say that it does
    not pay. `gemm_share` and `attention_share` say what separate cores could give: the share of its rate on all threads
    that each keeps when matrix products run on half of the threads beside decode attention on the other half (0 where
    that cannot be measured).
    Reading a file of another `version` fails: calibrate again. Raises: ConfigError for rates that are not positive.
    """

    machine: str
    dtype: Dtype
    num_threads: int
    gemm_flop_per_s: float
    weight_bytes_per_s: float
    kv_bytes_per_s: float
    prefill_attention_flop_per_s: float
    constant_s: float
    compute_delay: float
    memory_delay: float
    memory_bytes: float
    gemm_points: tuple[tuple[int, float], ...] = ()
    bandwidth_points: tuple[tuple[int, float], ...] = ()
    gemm_share: float = 0.0
    attention_share: float = 0.0
    chunk_bytes: int = 384 << 10
    tile_flop: int = 5_000_000
    step_bytes: int = 48
    memory_lanes: int = 0
    version: int = 2

    def __post_init__(self) -> None:
        rates = (
            self.gemm_flop_per_s,
            self.weight_bytes_per_s,
            self.kv_bytes_per_s,
            self.prefill_attention_flop_per_s,
            self.memory_bytes,
            *(rate for _, rate in self.gemm_points + self.bandwidth_points),
        )
        others = (self.constant_s, self.gemm_share, self.attention_share)
        if not (all(0 < rate < math.inf for rate in rates) and all(0 <= value < math.inf for value in others)):
            raise ConfigError(f"a calibration needs positive rates; got {self}; {_CALIBRATE_AGAIN}")
        Interference(self.compute_delay, self.memory_delay)

    def separate_cores(self) -> Interference:
        """What an engine could reach that runs both kinds of work side by side until the shorter one ends.

        Attention of m seconds then takes m / attention_share, in which compute gets gemm_share of its speed: the rest
        of c is done alone, so c + m (1 - gemm_share) / attention_share; likewise the other way. Sequential where the
        two shares add up to no more than one machine.
        """
        if self.gemm_share + self.attention_share <= 1:
            return SEQUENTIAL
        return Interference(
            max(0.0, 1 - self.gemm_share) / self.attention_share, max(0.0, 1 - self.attention_share) / self.gemm_share
        )

    def overlap_cost(self) -> OverlapCost:
        """What the native engine decides by whether a step overlaps."""
        return OverlapCost(
            gemm_flop_per_s=self.gemm_flop_per_s,
            attention_flop_per_s=self.prefill_attention_flop_per_s,
            kv_bytes_per_s=self.kv_bytes_per_s,
            weight_bytes_per_s=self.weight_bytes_per_s,
            interference=Interference(self.compute_delay, self.memory_delay),
            chunk_bytes=self.chunk_bytes,
            tile_flop=self.tile_flop,
            step_bytes=self.step_bytes,
            memory_lanes=self.memory_lanes,
        )

    def hardware(self) -> HardwareSpec:
        """The machine as a spec whose peaks are what was measured."""
        return HardwareSpec(self.machine, self.gemm_flop_per_s, self.kv_bytes_per_s, self.memory_bytes)

    def peaks(self) -> Peaks:
        """The highest rates that were measured, of any number of tokens or threads."""
        flop_per_s = max(self.gemm_flop_per_s, *(rate for _, rate in self.gemm_points), 0.0)
        rates = (self.weight_bytes_per_s, self.kv_bytes_per_s, *(rate for _, rate in self.bandwidth_points))
        return Peaks(flop_per_s, max(rates), is_measured=True)

    def step_cost(self, model: ModelCost) -> StepCost:
        """Step cost of a model at the measured rates."""
        bytes_per_weight = model.weight_bytes / model.num_parameters
        return StepCost(
            weight_floor_s=bytes_per_weight * model.num_matmul_parameters / self.weight_bytes_per_s,
            constant_s=self.constant_s,
            token_s=2 * model.num_matmul_parameters / self.gemm_flop_per_s,
            kv_token_s=model.kv_bytes_per_token / self.kv_bytes_per_s,
            pair_s=4 * model.attention_width * model.num_layers / self.prefill_attention_flop_per_s,
            interference=Interference(self.compute_delay, self.memory_delay),
            head_floor_s=bytes_per_weight * model.num_head_parameters / self.weight_bytes_per_s,
            head_s=2 * model.num_head_parameters / self.gemm_flop_per_s,
            shared_kv_share=_NATIVE_SHARED_KV_SHARE,
        )

    def to_json(self) -> str:
        """One JSON object, keys as the fields."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Raises: ConfigError when the text is not a calibration of this version."""
        try:
            values: dict[str, Any] = json.loads(text)
            names = {field.name for field in fields(cls)}
            if values.get("version") != 2 or set(values) != names:
                raise ConfigError(
                    f"calibration has version {values.get('version')} and {len(values)} fields; {_CALIBRATE_AGAIN}"
                )
            for name in ("gemm_points", "bandwidth_points"):
                values[name] = tuple((int(count), float(rate)) for count, rate in values[name])
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"calibration cannot be read ({error}); {_CALIBRATE_AGAIN}") from error

    def save(self, cache_directory: Path) -> Path:
        """Write the file of its dtype under the directory, as a whole or not at all, and return its path.

        Raises: ConfigError when it cannot be written.
        """
        path = calibration_path(cache_directory, self.dtype)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            cache_directory.mkdir(parents=True, exist_ok=True)
            partial.write_text(self.to_json(), encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; set BLENDSERVE_CACHE to a directory that can be written"
            ) from error
        return path


def calibration_path(cache_directory: Path, dtype: Dtype) -> Path:
    return cache_directory / ("calibration.json" if dtype == "bf16" else f"calibration-{dtype}.json")


def load_calibration(cache_directory: Path, dtype: Dtype = "bf16") -> Calibration:
    """This machine's calibration. Raises: ConfigError when there is none or it cannot be used."""
    path = calibration_path(cache_directory, dtype)
    if not path.is_file():
        raise ConfigError(f"no calibration at {path}; run `blendserve calibrate --dtype {dtype}`")
    try:
        calibration = Calibration.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"calibration at {path} cannot be read ({error}); {_CALIBRATE_AGAIN}") from error
    if calibration.dtype != dtype:
        raise ConfigError(f"calibration at {path} is of {calibration.dtype}, not {dtype}; {_CALIBRATE_AGAIN}")
    return calibration


def matching_calibration(
    cache_directory: Path, num_threads: int, notify: Callable[[str], None], dtype: Dtype = "bf16"
) -> Calibration | None:
    """The calibration of a dtype if it was made on this processor with so many threads. None where there is none; one
    that is damaged or of another machine is told to `notify` and not used."""
    if not calibration_path(cache_directory, dtype).is_file():
        return None
    try:
        calibration = load_calibration(cache_directory, dtype)
    except ConfigError as error:
        notify(f"built-in rates are used: {error}")
        return None
    here, there = (machine_name(), num_threads), (calibration.machine, calibration.num_threads)
    if here != there:
        notify(
            f"built-in rates are used: the calibration is of {there[0]} with {there[1]} threads, this run has "
            f"{here[0]} with {here[1]}; {_CALIBRATE_AGAIN}"
        )
        return None
    return calibration


def machine_name() -> str:
    """This processor's model; on x86 with family and model number, since virtual machines blur the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    value_by_key = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = value_by_key.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in value_by_key:
        return name
    return f"{name} (family {value_by_key['cpu family']}, model {value_by_key.get('model', '?')})"

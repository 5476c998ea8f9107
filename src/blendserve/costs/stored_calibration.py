"""What was measured of this machine (`Calibration`), its file in the user's cache, and whether it belongs to this run.

`blendserve calibrate` writes it; step times (`StepCost`) and the choices of the native engine (`OverlapCost`) follow.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from blendserve.config import Dtype, KvDtype
from blendserve.costs.hardware import HardwareSpec, Peaks
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import SEQUENTIAL, Interference, OverlapCost, StepCost
from blendserve.errors import ConfigError

# Decode attention of the native engine over 1,024 shared of 1,124 tokens, and over copies of them, 3 query heads of 64
# per KV head, one Zen 3 thread (build/dev/bench_attention): 0.84 and 1.40 ms, 0.125 of both for the 100 of its own.
_NATIVE_SHARED_KV_SHARE = 0.56
_MOST_ITERATION_BYTES = 128  # two cache lines
_CALIBRATE_AGAIN = "run `blendserve calibrate` again"
_VERSION = 5

CalibrationEffort = Literal["first-run", "quick", "thorough"]
"""How a machine was measured: by the first long run on it in at most 3 s, or by `blendserve calibrate`, with --quick or
without."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rates measured on this machine, as stored in the user's cache, a file for each `dtype` of weights and each
    `kv_dtype` of keys and values. Rates are those of the whole machine.

    A step takes `loop_s` of scheduling, and in each layer `layer_constant_s` whatever it holds (norms, rotations, the
    start of attention). `gemm_points` are (tokens, flop/s) of matrix products, `step_points` the same of whole steps
    without their constants and attention, `bandwidth_points` (threads, bytes/s). The delays are those of steps that
    overlap in each core, and `chunk_bytes` to `memory_lanes` the settings they were measured with (`OverlapCost`);
    delays of 1 say that it does not pay. `gemm_share` and `attention_share` say what separate cores could give: the
    share of its rate on all threads that each keeps when matrix products run on half of the threads beside decode
    attention on the other half (0 where that cannot be measured). `effort` says how long it was measured.
    Reading a file of another `version` fails: calibrate again. Raises: ConfigError for rates that are not positive.
    """

    machine: str
    dtype: Dtype
    num_threads: int
    gemm_flop_per_s: float
    weight_bytes_per_s: float
    kv_bytes_per_s: float
    prefill_attention_flop_per_s: float
    layer_constant_s: float
    loop_s: float
    compute_delay: float
    memory_delay: float
    memory_bytes: float
    gemm_points: tuple[tuple[int, float], ...] = ()
    step_points: tuple[tuple[int, float], ...] = ()
    bandwidth_points: tuple[tuple[int, float], ...] = ()
    gemm_share: float = 0.0
    attention_share: float = 0.0
    chunk_bytes: int = 256 << 10
    tile_flop: int = 3_500_000
    iteration_bytes: int = 128
    memory_lanes: int = 0
    kv_dtype: KvDtype = "bf16"
    effort: CalibrationEffort = "thorough"
    version: int = _VERSION

    def __post_init__(self) -> None:
        rates = (
            self.gemm_flop_per_s,
            self.weight_bytes_per_s,
            self.kv_bytes_per_s,
            self.prefill_attention_flop_per_s,
            self.memory_bytes,
            *(rate for _, rate in self.gemm_points + self.step_points + self.bandwidth_points),
        )
        others = (self.layer_constant_s, self.loop_s, self.gemm_share, self.attention_share)
        if not (all(0 < rate < math.inf for rate in rates) and all(0 <= value < math.inf for value in others)):
            raise ConfigError(f"a rate in it is not above 0; {_CALIBRATE_AGAIN}")
        settings = (self.chunk_bytes, self.tile_flop, self.iteration_bytes)
        if min(settings) < 1 or self.iteration_bytes > _MOST_ITERATION_BYTES or self.memory_lanes < 0:
            raise ConfigError(
                f"chunk_bytes, tile_flop and iteration_bytes in it are {settings}, memory_lanes is "
                f"{self.memory_lanes}; {_CALIBRATE_AGAIN}"
            )
        if self.effort not in get_args(CalibrationEffort):
            raise ConfigError(f"its effort is {self.effort!r}; {_CALIBRATE_AGAIN}")
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
            iteration_bytes=self.iteration_bytes,
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

    def step_cost(self, model: ModelCost, overlap: str = "auto") -> StepCost:
        """Step cost of a model at the measured rates; `overlap` is the engine's mode."""
        interference = Interference(self.compute_delay, self.memory_delay)
        flop_per_token = 2 * model.num_matmul_parameters
        # Never negative: the linear part is what bounds rest on.
        extra = [
            (float(count), max(0.0, flop_per_token * count * (1 / rate - 1 / self.gemm_flop_per_s)))
            for count, rate in self.step_points
        ]
        bytes_per_weight = model.weight_bytes / model.num_parameters
        return StepCost(
            weight_floor_s=bytes_per_weight * model.num_matmul_parameters / self.weight_bytes_per_s,
            constant_s=self.loop_s + self.layer_constant_s * model.num_layers,
            token_s=2 * model.num_matmul_parameters / self.gemm_flop_per_s,
            kv_token_s=model.kv_bytes_per_token / self.kv_bytes_per_s,
            pair_s=4 * model.attention_width * model.num_layers / self.prefill_attention_flop_per_s,
            interference=SEQUENTIAL if overlap == "off" else interference,
            head_floor_s=bytes_per_weight * model.num_head_parameters / self.weight_bytes_per_s,
            head_s=2 * model.num_head_parameters / self.gemm_flop_per_s,
            shared_kv_share=_NATIVE_SHARED_KV_SHARE,
            extra_points=tuple(extra),
            nano_batches="on" if overlap == "on" else "auto",
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
            if values.get("version") != _VERSION or set(values) != names:
                raise ConfigError(f"it was made by another version of BlendServe; {_CALIBRATE_AGAIN}")
            for name in ("gemm_points", "step_points", "bandwidth_points"):
                values[name] = tuple((int(count), float(rate)) for count, rate in values[name])
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"it is damaged ({error}); {_CALIBRATE_AGAIN}") from error

    def save(self, cache_directory: Path) -> Path:
        """Write the file of its dtypes under the directory, as a whole or not at all, and return its path.

        Raises: ConfigError when it cannot be written.
        """
        path = calibration_path(cache_directory, self.dtype, self.kv_dtype)
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


def calibration_path(cache_directory: Path, dtype: Dtype, kv_dtype: KvDtype = "bf16") -> Path:
    name = "calibration" if dtype == "bf16" else f"calibration-{dtype}"
    return cache_directory / (f"{name}.json" if kv_dtype == "bf16" else f"{name}-kv-{kv_dtype}.json")


def load_calibration(cache_directory: Path, dtype: Dtype = "bf16", kv_dtype: KvDtype = "bf16") -> Calibration:
    """This machine's calibration. Raises: ConfigError when there is none or it cannot be used."""
    path = calibration_path(cache_directory, dtype, kv_dtype)
    if not path.is_file():
        of_kv = "" if kv_dtype == "bf16" else f" --kv-dtype {kv_dtype}"
        raise ConfigError(
            f"this machine has not been measured: there is no {path}; run `blendserve calibrate --dtype {dtype}{of_kv}`"
        )
    try:
        calibration = Calibration.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the calibration {path}: {error}; {_CALIBRATE_AGAIN}") from error
    except ConfigError as error:
        raise ConfigError(f"the calibration {path} cannot be used: {error}") from error
    if (calibration.dtype, calibration.kv_dtype) != (dtype, kv_dtype):
        raise ConfigError(
            f"the calibration {path} is for --dtype {calibration.dtype} --kv-dtype {calibration.kv_dtype}, not for "
            f"--dtype {dtype} --kv-dtype {kv_dtype}; {_CALIBRATE_AGAIN}"
        )
    return calibration


def is_replaceable(cache_directory: Path, dtype: Dtype, kv_dtype: KvDtype = "bf16") -> bool:
    """May a first run store its calibration? Not over one that `blendserve calibrate` made and that can be read."""
    try:
        return load_calibration(cache_directory, dtype, kv_dtype).effort == "first-run"
    except ConfigError:
        return True


def matching_calibration(
    cache_directory: Path,
    num_threads: int,
    notify: Callable[[str], None],
    dtype: Dtype = "bf16",
    kv_dtype: KvDtype = "bf16",
) -> Calibration | None:
    """The calibration of these dtypes if it was made on this processor with so many threads, else None. One that is
    damaged or of another machine is told to `notify` and not used."""
    if not calibration_path(cache_directory, dtype, kv_dtype).is_file():
        return None
    try:
        calibration = load_calibration(cache_directory, dtype, kv_dtype)
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

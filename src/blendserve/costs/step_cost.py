"""The time of one engine step on a device (`StepCost`), and how far compute and memory time hide each other.

The only place where the simulator is calibrated: paper Table 1 (Llama-3-8B on an A100) gives rates as shares of peak,
and those shares are assumed to hold for every GPU, model and degree of tensor parallelism. `stored_calibration.py` has
the same numbers measured on a machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from blendserve.costs.hardware import A100_80G, HardwareSpec, check_tensor_parallel
from blendserve.costs.model_cost import CostModel, Floats, ModelCost
from blendserve.errors import ConfigError


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
            raise ConfigError(
                f"the delays of compute and memory are {self.compute_delay} and {self.memory_delay}; both must be from "
                "0 to 1"
            )

    def step_s(self, compute_s: float, memory_s: float) -> float:
        """Elapsed time of one step."""
        return max(compute_s + self.compute_delay * memory_s, memory_s + self.memory_delay * compute_s)

    def steps_s(self, compute_s: Floats, memory_s: Floats) -> Floats:
        """Elapsed time of many steps, aligned arrays."""
        return np.maximum(compute_s + self.compute_delay * memory_s, memory_s + self.memory_delay * compute_s)

    @property
    def hides_time(self) -> bool:
        """Does a step of equal compute and memory time save more by overlap than evening steps out costs?"""
        return self.step_s(1.0, 1.0) < 2.0 * (1.0 - LEAST_OVERLAP)


NanoBatches = Literal["free", "auto", "on"]
"""What overlapping a step costs. free: nothing, so that every step overlaps. The native engine runs the step as two
nano-batches, which read the weights twice: where that pays by `LEAST_STEP_GAIN` (auto), or always (on)."""
LEAST_STEP_GAIN = 0.01
"""As in csrc/overlap.cpp."""
LEAST_OVERLAP = 0.05
"""Share of the time of balanced steps that overlap must save to be planned for. Steps that are kept even are smaller,
which costs a few percent by itself (docs/log.md), and calibrations scatter by as much."""
_LEAST_SPLIT_TOKENS = 2
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


@dataclass(frozen=True, slots=True)
class StepCost:
    """Time of one engine step: c = max(weight_floor_s, constant_s + token_s n + extra) + head + prefill attention, m =
    KV tokens read, then f(c, m). `extra_points` are (tokens, seconds) that steps of few tokens take longer because
    their matrix products are slower: linear between points, nothing beyond the last. The head, max(head_floor_s, head_s
    n'), is for the n' tokens that are sampled; zeros leave it out, as Table 1 does.

    Units: seconds; `token_s` per scheduled token, `pair_s` per pair of a prefill token and a token it attends to,
    `kv_token_s` per token of KV that a decode reads. `shared_kv_share` is the part of it that a decode pays for a token
    which another decode of the step reads too: 1 on engines that read a shared prefix for every sequence, as the
    paper's do; less where it is read once. The planner's `CostModel` knows nothing of it: who runs beside whom is not
    known before the run, so its densities count every read. `nano_batches` says which steps overlap.
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
    nano_batches: NanoBatches = "free"
    extra_points: tuple[tuple[float, float], ...] = ()

    def compute_s(self, num_tokens: float, num_pairs: float = 0.0, num_sampled: float = 0.0) -> float:
        """GEMM time of a step of so many tokens, some of them sampled, plus its prefill attention."""
        layers_s = max(self.weight_floor_s, self.constant_s + self._products_s(num_tokens))
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
        return self.step_s(num_tokens, compute_s, self.memory_s(num_kv_tokens))

    def step_s(self, num_tokens: float, compute_s: float, memory_s: float) -> float:
        """Time of a step of so many tokens from its compute and memory time."""
        overlapped_s = self.interference.step_s(compute_s, memory_s)
        if self.nano_batches == "free":
            return overlapped_s
        apart_s = compute_s + memory_s
        if num_tokens < _LEAST_SPLIT_TOKENS:
            return apart_s
        overlapped_s += self.again_s(num_tokens)
        return overlapped_s if self.nano_batches == "on" else _better(overlapped_s, apart_s)

    def again_s(self, num_tokens: float) -> float:
        """What two nano-batches take longer because both read the weights; arithmetic hides it in large steps."""
        half_s, whole_s = self._products_s(num_tokens / 2), self._products_s(num_tokens)
        return max(0.0, 2 * max(half_s, self.weight_floor_s) - max(whole_s, self.weight_floor_s))

    def _products_s(self, num_tokens: float) -> float:
        if not self.extra_points:
            return self.token_s * num_tokens
        counts, seconds = zip(*self.extra_points, strict=True)
        return self.token_s * num_tokens + float(np.interp(num_tokens, counts, seconds, right=0.0))

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


def _better(overlapped_s: float, apart_s: float) -> float:
    return overlapped_s if overlapped_s < (1 - LEAST_STEP_GAIN) * apart_s else apart_s


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


@dataclass(frozen=True, slots=True)
class OverlapCost:
    """What the native engine needs to know of a machine in order to run a step's matrix products beside its attention:
    rates of all threads, and the three settings that calibration tries. `interference` is that of steps that overlap;
    SEQUENTIAL means that it does not pay. The defaults are those of csrc/overlap.h.

    `chunk_bytes` of KV are fetched beside a matmul tile of `tile_flop`, `iteration_bytes` per iteration of its inner
    loop.
    """

    gemm_flop_per_s: float = 165e9
    attention_flop_per_s: float = 120e9
    kv_bytes_per_s: float = 18e9
    weight_bytes_per_s: float = 20e9
    interference: Interference = SEQUENTIAL
    chunk_bytes: int = 256 << 10
    tile_flop: int = 3_500_000
    iteration_bytes: int = 128
    memory_lanes: int = 0

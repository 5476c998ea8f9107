"""What requests cost in compute time and in memory time, and the density that compares the two (paper sections 4 and
7).

Everything is vectorised over NumPy arrays and linear in three rates, so one `CostModel` serves requests, tree nodes,
batches and whole workloads. Step times (constants, floors, interference) are in `hardware.StepCost`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from blendserve.config import KvDtype
from blendserve.errors import ConfigError
from blendserve.models.spec import ModelSpec

Floats = NDArray[np.float64]
Lengths = NDArray[np.int64] | NDArray[np.int32] | Floats | Sequence[int] | Sequence[float]


@dataclass(frozen=True, slots=True)
class ModelCost:
    """The numbers of a model that its cost depends on.

    `num_parameters` is the paper's P (embeddings included), `num_matmul_parameters` those of the layers alone: what
    every token is multiplied by, `num_head_parameters` those of the vocabulary's matrix, by which only sampled tokens
    are. `attention_width` is query heads times head size. Attention variants (MHA, GQA, MQA,
    MLA) differ in `kv_bytes_per_token` only.
    """

    name: str
    num_parameters: int
    num_matmul_parameters: int
    num_layers: int
    attention_width: int
    kv_bytes_per_token: float
    weight_bytes: float
    num_head_parameters: int = 0

    @classmethod
    def from_spec(cls, spec: ModelSpec, *, bytes_per_weight: float = 2, kv_dtype: KvDtype = "bf16") -> ModelCost:
        """Cost numbers of MHA, GQA or MQA: `spec.num_kv_heads` is the number of heads, fewer, or one."""
        return cls(
            name=spec.name,
            num_parameters=spec.num_parameters,
            num_matmul_parameters=spec.num_layers * spec.num_layer_parameters,
            num_layers=spec.num_layers,
            attention_width=spec.num_heads * spec.head_dim,
            kv_bytes_per_token=spec.kv_bytes_per_token(kv_dtype),
            weight_bytes=spec.num_parameters * bytes_per_weight,
            num_head_parameters=spec.vocab_size * spec.hidden_size,
        )

    def with_latent_kv(self, latent_width: int, rope_width: int, *, bytes_per_kv: float = 2) -> ModelCost:
        """The same model with MLA: one latent vector and one rotary key per token and layer, shared by all heads."""
        return replace(self, kv_bytes_per_token=self.num_layers * (latent_width + rope_width) * bytes_per_kv)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Compute and memory seconds from token counts.

    `token_s`: all matrix products of one token. `head_s`: what an output token takes beside that, where the
    vocabulary's matrix is counted apart (0 where it is in `token_s`, as in the paper's formula). `pair_s`: attention of
    one prefill token to one prompt token (0 drops the quadratic term, as the paper allows). `kv_token_s`: reading the
    KV of one token once. `has_overlap`: does the engine hide one of the two behind the other? If not, their mix in a
    step is of no matter.
    """

    token_s: float
    kv_token_s: float
    pair_s: float = 0.0
    head_s: float = 0.0
    has_overlap: bool = True

    def __post_init__(self) -> None:
        if self.token_s <= 0 or self.kv_token_s <= 0 or self.pair_s < 0 or self.head_s < 0:
            raise ConfigError(
                f"the times of a cost model are {self.token_s}, {self.kv_token_s}, {self.pair_s} and {self.head_s} s; "
                "the first two must be above 0, the others 0 or more"
            )

    @classmethod
    def at_rates(
        cls,
        model: ModelCost,
        *,
        flop_per_s: float,
        bytes_per_s: float,
        has_prefill_attention: bool = False,
        has_overlap: bool = True,
    ) -> CostModel:
        """The paper's formulas at the given rates: 2 P flop per token, 4 H L per pair, K and V of every layer per
        read."""
        pair_flop = 4 * model.attention_width * model.num_layers
        return cls(
            token_s=2 * model.num_parameters / flop_per_s,
            kv_token_s=model.kv_bytes_per_token / bytes_per_s,
            pair_s=pair_flop / flop_per_s if has_prefill_attention else 0.0,
            has_overlap=has_overlap,
        )

    @property
    def decode_s(self) -> float:
        """Matrix products of one output token."""
        return self.token_s + self.head_s

    @overload
    def compute_s(self, num_prompt_tokens: float, num_output_tokens: float) -> float: ...
    @overload
    def compute_s(self, num_prompt_tokens: Lengths, num_output_tokens: Lengths) -> Floats: ...
    def compute_s(self, num_prompt_tokens: Lengths | float, num_output_tokens: Lengths | float) -> Floats | float:
        """Comp(r) = (2 (p + d) P + 4 p^2 H L) / compute, nothing shared."""
        prompt, output = _floats(num_prompt_tokens), _floats(num_output_tokens)
        return self.token_s * (prompt + output) + self.head_s * output + self.pair_s * prompt * prompt

    @overload
    def memory_s(self, num_prompt_tokens: float, num_output_tokens: float) -> float: ...
    @overload
    def memory_s(self, num_prompt_tokens: Lengths, num_output_tokens: Lengths) -> Floats: ...
    def memory_s(self, num_prompt_tokens: Lengths | float, num_output_tokens: Lengths | float) -> Floats | float:
        """Mem(r) = (p d + d^2 / 2) KV bytes / bandwidth. A prefix hit saves none of it: shared KV is read by every
        decode."""
        prompt, output = _floats(num_prompt_tokens), _floats(num_output_tokens)
        return self.kv_token_s * output * (prompt + output / 2)

    @overload
    def prefix_compute_s(self, num_prefix_tokens: float) -> float: ...
    @overload
    def prefix_compute_s(self, num_prefix_tokens: Lengths) -> Floats: ...
    def prefix_compute_s(self, num_prefix_tokens: Lengths | float) -> Floats | float:
        """What one hit on a cached prefix of so many tokens saves."""
        prefix = _floats(num_prefix_tokens)
        return self.token_s * prefix + self.pair_s * prefix * prefix

    def density(self, num_prompt_tokens: Lengths, num_output_tokens: Lengths) -> Floats:
        """Compute over memory time of each request; infinite where nothing is decoded."""
        return ratio(
            self.compute_s(num_prompt_tokens, num_output_tokens), self.memory_s(num_prompt_tokens, num_output_tokens)
        )

    def total(
        self, num_prompt_tokens: Lengths, num_output_tokens: Lengths, num_saved_tokens: Lengths | float = 0.0
    ) -> WorkloadCost:
        """Sums over requests; `num_saved_tokens` are each request's prompt tokens that sharing spares."""
        return WorkloadCost(
            compute_s=float(np.sum(self.compute_s(num_prompt_tokens, num_output_tokens))),
            memory_s=float(np.sum(self.memory_s(num_prompt_tokens, num_output_tokens))),
            saved_s=float(np.sum(self.prefix_compute_s(_floats(num_saved_tokens)))),
        )

    def steady_batch(self, num_prompt_tokens: float, num_output_tokens: float, capacity_tokens: float) -> SteadyBatch:
        """The batch that continuous batching of many equal requests converges to, given the KV pool (paper section
        4)."""
        if num_output_tokens <= 0:
            raise ConfigError(f"answers have {num_output_tokens} tokens; they must have at least 1")
        num_decodes = capacity_tokens / (num_prompt_tokens + num_output_tokens / 2)
        num_prefill = num_decodes * num_prompt_tokens / num_output_tokens
        prefill_s = num_prefill * (self.token_s + num_prompt_tokens * self.pair_s)
        compute = num_decodes * self.decode_s + prefill_s
        return SteadyBatch(num_decodes, num_prefill, compute, capacity_tokens * self.kv_token_s)


@dataclass(frozen=True, slots=True)
class WorkloadCost:
    """Resource seconds of a set of requests: a subtree, an end of the scan, a whole job.

    Sharing is weighted by compute, so that `density` = (1 - sharing) sum Comp / sum Mem holds exactly.
    """

    compute_s: float
    memory_s: float
    saved_s: float = 0.0

    @property
    def sharing(self) -> float:
        """Share of the compute that prefix hits save."""
        return self.saved_s / self.compute_s if self.compute_s else 0.0

    @property
    def remaining_compute_s(self) -> float:
        """(1 - sharing) * compute."""
        return self.compute_s - self.saved_s

    @property
    def density(self) -> float:
        """Compute density with sharing taken off; infinite where nothing is decoded."""
        return self.remaining_compute_s / self.memory_s if self.memory_s else float("inf")


@dataclass(frozen=True, slots=True)
class SteadyBatch:
    """One step of a steady mix. Units: sequences, tokens, seconds."""

    num_decode_tokens: float
    num_prefill_tokens: float
    compute_s: float
    memory_s: float

    @property
    def density(self) -> float:
        """Compute over memory time of the step."""
        return self.compute_s / self.memory_s


def ratio(compute_s: Floats, memory_s: Floats) -> Floats:
    """Density of aligned arrays; infinite where there is no memory time."""
    return np.divide(compute_s, memory_s, out=np.full_like(compute_s, np.inf), where=memory_s > 0)


def partition_memory(
    compute_density: float, memory_density: float, root_density: float, capacity: float
) -> tuple[float, float]:
    """Split KV memory between the two ends so that their mix has the root's density (paper section 5.3).

    Returns the compute end's and the memory end's shares, in the unit of `capacity`; an end that cannot balance the
    other (densities equal, or the root outside them) gets all or nothing.
    """
    spread = compute_density - memory_density
    if spread <= 0:
        return capacity / 2, capacity / 2
    share = min(1.0, max(0.0, (root_density - memory_density) / spread))
    return capacity * share, capacity * (1 - share)


def _floats(lengths: Lengths | float) -> Floats:
    return np.asarray(lengths, dtype=np.float64)

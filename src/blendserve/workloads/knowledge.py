"""What a planner is told of output lengths in an experiment: samples, the truth, or the truth times a factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from blendserve.workloads.traces import Floats, Int64s


@dataclass(frozen=True, slots=True)
class LengthKnowledge:
    """`sampled`: nothing beforehand but what the request fixes; `means`: the same, and of sampled requests only their
    mean, as the paper has it; `exact`: all lengths; `scaled`: all, times `factor`."""

    kind: Literal["sampled", "means", "exact", "scaled"] = "sampled"
    factor: float = 1.0
    sample_rate: float = 0.01


SAMPLED = LengthKnowledge()
EXACT = LengthKnowledge("exact")


class ScaledLengths:
    """Estimates that are the true lengths times a factor and never learn: how robust a policy is to bad ones.

    A request that outlives its estimate is expected to go on for a quarter of what it has. Meets
    `planner.lengths.Lengths`.
    """

    def __init__(self, num_output_tokens: Int64s, factor: float) -> None:
        self.samples: Int64s = np.zeros(0, dtype=np.int64)
        self._estimate = np.maximum(1.0, num_output_tokens * factor)

    @property
    def num_observed(self) -> int:
        return 0

    def observe(self, index: int, num_output_tokens: int) -> None:
        pass

    def refresh(self, running: Int64s | None = None, num_output_tokens: Int64s | None = None) -> None:
        pass

    def estimate(self, indices: Int64s) -> Floats:
        """Expected output tokens of requests that have not started."""
        estimates: Floats = self._estimate[indices]
        return estimates

    def remaining(self, indices: Int64s, num_output_tokens: Int64s) -> Floats:
        """Expected output tokens still to come."""
        left: Floats = self._estimate[indices] - num_output_tokens
        return np.where(left >= 1, left, np.maximum(1.0, num_output_tokens / 4))

    def moments(self, indices: Int64s, num_output_tokens: Int64s) -> tuple[Floats, Floats]:
        """The estimate and its square."""
        left = self.remaining(indices, num_output_tokens)
        return left, left * left

    def quantiles(self, indices: Int64s, num_output_tokens: Int64s) -> Floats:
        """The estimate, as the only quantile. Shapes: [len(indices), 1]."""
        return self.remaining(indices, num_output_tokens)[:, None]

    def outset(self, index: int) -> Floats:
        """The estimate of one request that has not started."""
        estimate: Floats = self._estimate[index : index + 1]
        return estimate

    def longest_unknown(self, indices: Int64s) -> float:  # noqa: ARG002
        """Every length counts as known."""
        return 0.0

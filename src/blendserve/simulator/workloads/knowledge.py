"""What a planner is told of output lengths in an experiment: samples, the truth, or the truth times a factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from blendserve.simulator.workloads.traces import Floats, Int64s


@dataclass(frozen=True, slots=True)
class LengthKnowledge:
    """`sampled`: nothing beforehand but what the request fixes; `means`: the same, and of sampled requests only their
    mean, as the paper has it; `exact`: all lengths; `scaled`: all, times `factor`; `scattered`: each times `factor` or
    divided by it, by lot. `learns`: are scaled estimates corrected by what finishes?"""

    kind: Literal["sampled", "means", "exact", "scaled", "scattered"] = "sampled"
    factor: float = 1.0
    sample_rate: float = 0.01
    learns: bool = True


SAMPLED = LengthKnowledge()
EXACT = LengthKnowledge("exact")


def wrong_estimates(num_output_tokens: Int64s, lengths: LengthKnowledge, seed: int) -> Floats:
    """The true lengths, off by `lengths.factor`. Shapes: float64[num_requests]."""
    towards = np.ones(len(num_output_tokens))
    if lengths.kind == "scattered":
        towards = np.random.default_rng(seed).choice([-1.0, 1.0], len(num_output_tokens))
    estimates: Floats = num_output_tokens * lengths.factor**towards
    return estimates


class GivenLengths:
    """One estimate per request, from wherever. Meets `planner.lengths.Lengths`.

    With `learns`, one factor corrects them all: what finished requests had, over what was estimated of them. A request
    that outlives its estimate is expected to go on for a quarter of what it has.
    """

    def __init__(self, estimates: Floats, *, learns: bool = False) -> None:
        self.samples: Int64s = np.zeros(0, dtype=np.int64)
        self._given = np.maximum(1.0, estimates)
        self._estimate = self._given
        self._learns = learns
        self._num_observed, self._observed, self._expected = 0, 0.0, 0.0

    @property
    def num_observed(self) -> int:
        return self._num_observed if self._learns else 0

    def observe(self, index: int, num_output_tokens: int) -> None:
        """A request has finished; one that was refused (0 tokens) tells nothing."""
        if num_output_tokens:
            self._num_observed += 1
            self._observed += num_output_tokens
            self._expected += float(self._given[index])

    def refresh(self, running: Int64s | None = None, num_output_tokens: Int64s | None = None) -> None:  # noqa: ARG002
        """Correct the estimates by what has finished."""
        if self._learns and self._num_observed:
            self._estimate = np.maximum(1.0, self._given * (self._observed / self._expected))

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

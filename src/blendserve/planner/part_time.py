"""How long a replica takes for its part of a job: what a partition makes even.

A part takes at least as many steps as its longest request has tokens, whatever else it holds, and every step costs a
constant. So a replica that holds a very long request must get less of the other work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blendserve.costs.model_cost import Floats
from blendserve.costs.step_cost import Interference


@dataclass(frozen=True, slots=True)
class PartEngine:
    """What a replica's steps cost. Units: seconds: a constant for each step, the least compute time of a step, and the
    memory time of a step that reads the full KV memory."""

    constant_s: float
    floor_s: float
    full_s: float
    interference: Interference

    def time_s(self, compute_s: Floats, memory_s: Floats, longest_tokens: Floats) -> Floats:
        """Time of parts with this work, and a longest request of that many tokens. Shapes: aligned."""
        num_steps = np.maximum(memory_s / self.full_s, longest_tokens)
        compute_s = np.maximum(compute_s + self.constant_s * num_steps, self.floor_s * longest_tokens)
        return self.interference.steps_s(compute_s, memory_s)

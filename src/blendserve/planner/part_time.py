"""How long a replica takes for its part of a job: what a partition makes even.

A part takes at least as many steps as its longest request has tokens, whatever else it holds, and every step costs a
constant. So a replica that holds a very long request must get less of the other work. Its long requests start together
and grow together: the KV that steps read rises until they end one by one, and its steps are bound by memory at the top.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blendserve.costs.model_cost import Floats
from blendserve.costs.step_cost import Interference
from blendserve.planner.pace import EVEN_SHARE

NUM_STRETCHES = 24
"""Stretches of equally many steps into which a part's run is divided."""


@dataclass(frozen=True, slots=True)
class PartEngine:
    """What a replica's steps cost. Units: seconds: a constant for each step, the least compute time of a step, the
    memory time of a token of KV and that of a step that reads the full KV memory."""

    constant_s: float
    floor_s: float
    kv_token_s: float
    full_s: float
    interference: Interference

    def reads_s(self, long_tokens: Floats) -> Floats:
        """Memory time of each stretch of a run of long requests, given by their output tokens, that start together.

        Shapes: [NUM_STRETCHES].
        """
        longest = float(long_tokens.max(initial=0.0))
        step = (np.arange(NUM_STRETCHES) + 0.5) * longest / NUM_STRETCHES
        num_running = len(long_tokens) - np.searchsorted(np.sort(long_tokens), step)
        reads: Floats = self.kv_token_s * num_running * step * longest / NUM_STRETCHES
        return reads

    def time_s(self, compute_s: Floats, memory_s: Floats, longest_tokens: Floats, reads_s: Floats) -> Floats:
        """Time of parts with this work. Shapes: [num_parts]; `reads_s` [num_parts, NUM_STRETCHES], which is the part of
        `memory_s` that long requests read. The rest is spread over all steps, and so is what the KV memory cannot hold
        at once; compute follows memory as in `pace.py`.
        """
        num_steps = np.maximum(memory_s / self.full_s, longest_tokens)[:, None] / NUM_STRETCHES
        full = self.full_s * num_steps
        rest = np.maximum(memory_s - reads_s.sum(axis=1), 0.0)[:, None]
        memory = np.minimum(reads_s + rest / NUM_STRETCHES, full)
        room = full - memory
        left = np.maximum(memory_s[:, None] - memory.sum(axis=1, keepdims=True), 0.0)
        memory = memory + room * np.minimum(left / np.maximum(room.sum(axis=1, keepdims=True), 1e-300), 1.0)
        weight = memory + EVEN_SHARE * full
        share = weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-300)
        compute = np.maximum(compute_s[:, None] * share + self.constant_s * num_steps, self.floor_s * num_steps)
        time_s: Floats = self.interference.steps_s(compute, memory).sum(axis=1)
        return time_s

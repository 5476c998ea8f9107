"""What the engine does between two steps on this machine: admit, schedule, apply."""

from __future__ import annotations

import numpy as np

from blendserve.calibration.step_probe import Clock
from blendserve.config import EngineConfig
from blendserve.costs.model_cost import CostModel
from blendserve.costs.step_cost import StepCost
from blendserve.engine.loop import EngineLoop
from blendserve.engine.planned import plan_requests, run_planned
from blendserve.engine.step import StepPlan, StepResult
from blendserve.executors.simulated import SimulatedExecutor
from blendserve.planner.sorting import flatten
from blendserve.planner.table import request_table
from blendserve.request import Request, SamplingParams

_POLICY = "blend"
_NUM_REQUESTS = 12
_MAX_NUM_SEQS = 8
_PROMPT_TOKENS = 64
_OUTPUT_TOKENS = 24
_CAPACITY_TOKENS = 4096
_SWEPT_BYTES = 40 << 20


class _CacheSweeper(SimulatedExecutor):
    """Takes no time on its own clock, but leaves the caches of a core as a forward pass does: without what the loop
    used before."""

    needs_tokens = True

    def __init__(self) -> None:
        super().__init__(StepCost(1e-3, 0.0, 1e-5, 1e-8), _CAPACITY_TOKENS)
        self._swept = np.ones(_SWEPT_BYTES // 8)

    def execute(self, plan: StepPlan) -> StepResult:
        self._swept.sum()
        return super().execute(plan)


def measure_loop_s(clock: Clock) -> float:
    """Seconds per step that the loop takes beside its executor, under the default policy."""
    config = EngineConfig(max_num_seqs=_MAX_NUM_SEQS, max_num_batched_tokens=256, max_model_len=_CAPACITY_TOKENS)
    sampling = SamplingParams(max_tokens=_OUTPUT_TOKENS)
    prompts = [np.full(_PROMPT_TOKENS, index, dtype=np.int32) for index in range(_NUM_REQUESTS)]
    requests = [Request(index, prompt, len(prompt), sampling, _OUTPUT_TOKENS) for index, prompt in enumerate(prompts)]
    table = request_table(map(len, prompts), [(sampling, _OUTPUT_TOKENS)] * _NUM_REQUESTS)
    plan = plan_requests(flatten(prompts), table, CostModel(token_s=1e-5, kv_token_s=1e-8))
    with EngineLoop(_CacheSweeper(), config, clock=clock) as loop:
        for _ in run_planned(loop, requests, plan, _POLICY):
            pass
        return float(np.median(loop.stats.scheduling_s_by_step))

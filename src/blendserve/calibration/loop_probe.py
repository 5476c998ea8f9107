"""What the engine does between two steps on this machine: admit, schedule, apply."""

from __future__ import annotations

import numpy as np

from blendserve.calibration.step_probe import Clock, SyntheticWeights
from blendserve.config import BLOCK_SIZE, Dtype, EngineConfig
from blendserve.costs.model_cost import CostModel
from blendserve.engine.loop import EngineLoop
from blendserve.engine.planned import plan_requests, run_planned
from blendserve.executors.native import NativeExecutor
from blendserve.models.spec import ModelSpec
from blendserve.planner.sorting import flatten
from blendserve.planner.table import request_table
from blendserve.request import Request, SamplingParams

_POLICY = "blend"
_NUM_REQUESTS = 12
_MAX_NUM_SEQS = 8
_PROMPT_TOKENS = 16
_OUTPUT_TOKENS = 24
_MAX_MODEL_LEN = 64


def measure_loop_s(spec: ModelSpec, num_threads: int, dtype: Dtype, clock: Clock) -> float:
    """Seconds per step that the loop takes beside its executor, under the default policy.

    The steps are real: a forward pass leaves the caches of a core without anything that the loop used before, which
    makes the loop three times as slow as it is by itself.
    """
    config = EngineConfig(
        max_num_seqs=_MAX_NUM_SEQS,
        max_num_batched_tokens=_MAX_NUM_SEQS * _PROMPT_TOKENS,
        max_model_len=_MAX_MODEL_LEN,
        num_threads=num_threads,
        overlap="off",
        dtype=dtype,
    )
    sampling = SamplingParams(max_tokens=_OUTPUT_TOKENS, ignore_eos=True)
    prompts = [np.full(_PROMPT_TOKENS, index, dtype=np.int32) for index in range(_NUM_REQUESTS)]
    requests = [Request(index, prompt, len(prompt), sampling, _OUTPUT_TOKENS) for index, prompt in enumerate(prompts)]
    table = request_table(map(len, prompts), [(sampling, _OUTPUT_TOKENS)] * _NUM_REQUESTS)
    plan = plan_requests(flatten(prompts), table, CostModel(token_s=1e-5, kv_token_s=1e-8))
    num_blocks = _MAX_NUM_SEQS * _MAX_MODEL_LEN // BLOCK_SIZE
    executor = NativeExecutor(spec, SyntheticWeights(spec), config, num_blocks=num_blocks)
    with EngineLoop(executor, config, clock=clock) as loop:
        for _ in run_planned(loop, requests, plan, _POLICY):
            pass
        return float(np.median(loop.stats.scheduling_s_by_step))

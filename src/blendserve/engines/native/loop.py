"""The engine loop on the native executor: weights loaded, KV memory taken, threads started."""

from __future__ import annotations

from blendserve.config import BLOCK_SIZE, EngineConfig
from blendserve.costs.this_machine import overlap_cost_of, peaks_of
from blendserve.engine.loop import EngineLoop
from blendserve.executors.native import NativeExecutor
from blendserve.executors.trace import StepTrace
from blendserve.models.detokenize import StopChecker
from blendserve.models.load import LoadedModel


def open_executor(
    model: LoadedModel, config: EngineConfig, *, isa: str = "auto", trace: StepTrace | None = None
) -> NativeExecutor:
    """Load the weights. `config` has resolved limits; `trace` notes what steps do."""
    num_blocks = config.kv_memory_bytes // (model.spec.kv_bytes_per_token(config.kv_dtype) * BLOCK_SIZE)
    return NativeExecutor(
        model.spec,
        model.weights,
        config,
        num_blocks=num_blocks,
        isa=isa,
        peaks=peaks_of(config.num_threads, config.dtype, config.kv_dtype),
        trace=trace,
        overlap_cost=overlap_cost_of(config.num_threads, config.dtype, config.kv_dtype),
    )


def open_loop(model: LoadedModel, config: EngineConfig, *, isa: str = "auto") -> EngineLoop:
    """Load the weights and build an engine on the native executor. `config` has resolved limits."""
    executor = open_executor(model, config, isa=isa)
    return EngineLoop(executor, config, stop_checker=StopChecker(model.tokenizer))

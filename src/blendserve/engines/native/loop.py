"""The native executor of a run: weights loaded, KV memory taken, threads started, the machine measured."""

from __future__ import annotations

from collections.abc import Callable

from blendserve.calibration.first_run import calibrate_first_run
from blendserve.config import BLOCK_SIZE, EngineConfig
from blendserve.costs.stored_calibration import Calibration
from blendserve.costs.this_machine import overlap_cost_of, peaks_of
from blendserve.engine.constrained import GrammarConstraints
from blendserve.engine.grammar import GrammarCompiler
from blendserve.engine.loop import EngineLoop
from blendserve.executors.native import NativeExecutor
from blendserve.executors.trace import StepTrace
from blendserve.host import cache_dir
from blendserve.models.bad_words import BadWords
from blendserve.models.detokenize import StopChecker
from blendserve.models.load import LoadedModel


def open_executor(
    model: LoadedModel,
    config: EngineConfig,
    *,
    isa: str = "auto",
    trace: StepTrace | None = None,
    kept_bytes_per_block: int = 0,
) -> NativeExecutor:
    """Load the weights. `config` has resolved limits; `trace` notes what steps do. `kept_bytes_per_block` is what
    requests need beside the KV of a block, within the same memory."""
    bytes_per_block = model.spec.kv_bytes_per_token(config.kv_dtype) * BLOCK_SIZE + kept_bytes_per_block
    num_blocks = max(1, config.kv_memory_bytes // bytes_per_block)
    return NativeExecutor(
        model.spec,
        model.weights,
        config,
        num_blocks=num_blocks,
        isa=isa,
        peaks=peaks_of(config.num_threads, config.dtype, config.kv_dtype),
        trace=trace,
        overlap_cost=overlap_cost_of(config.num_threads, config.dtype, config.kv_dtype),
        pooling=model.pooling,
        bad_words=BadWords(model.tokenizer),
    )


def open_loop(model: LoadedModel, config: EngineConfig, executor: NativeExecutor) -> EngineLoop:
    """The loop around an executor, with what stop strings and grammars need of the model."""
    compiler = GrammarCompiler(model.tokenizer, model.spec.vocab_size, model.spec.eos_token_ids)
    return EngineLoop(
        executor,
        config,
        stop_checker=StopChecker(model.tokenizer),
        constraints=GrammarConstraints(compiler, config.max_num_seqs, executor.num_threads),
    )


def calibrate_executor(
    executor: NativeExecutor, config: EngineConfig, expected_s: Callable[[], float], notify: Callable[[str], None]
) -> Calibration | None:
    """Measure the machine if this is its first long run, and have the executor use it. Returns what was measured."""
    measured = calibrate_first_run(config, expected_s, cache_dir(), notify)
    if measured is not None:
        executor.set_overlap(config.overlap, measured.overlap_cost())
        executor.set_peaks(measured.peaks())
    return measured

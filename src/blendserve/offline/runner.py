"""The engine of an `LLM`: requests of one call at a time, planned and run, on a machine that the first long call
measures.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain

from blendserve.calibration.first_run import expected_work_s
from blendserve.config import EngineConfig
from blendserve.costs.model_cost import CostModel
from blendserve.costs.stored_calibration import Calibration
from blendserve.costs.this_machine import built_in_cost, cost_of
from blendserve.engine.planned import run_planned, run_windowed
from blendserve.engine.stats import RunStats
from blendserve.engines.native.loop import calibrate_executor, open_executor, open_loop
from blendserve.models.load import LoadedModel
from blendserve.offline.assembler import OutputAssembler, table_of
from blendserve.offline.turns import Turns
from blendserve.planner.base import RequestTable
from blendserve.planner.plan import make_plan
from blendserve.planner.sorting import flatten
from blendserve.planner.tree import PrefixTree
from blendserve.planner.windows import Window
from blendserve.request import Request, SequenceOutput

Note = Callable[[str], None]
"""Told what the user should read, one sentence at a time."""


class Runner:
    """Calls of several threads take turns. `config` has no limit left open. Raises: ConfigError when it cannot work."""

    def __init__(
        self, model: LoadedModel, config: EngineConfig, *, policy: str, isa: str, seed: int, note: Note
    ) -> None:
        self._spec = model.spec
        self._config = config
        self._policy = policy
        self._seed = seed
        self._note = note
        self._measured: Calibration | None = None
        self._cost = self._cost_now()
        self._executor = open_executor(model, config, isa=isa)
        self._engine = open_loop(model, config, self._executor)
        self._turns = Turns()

    @property
    def stats(self) -> RunStats:
        """Counts and times of the latest call."""
        return self._engine.stats

    def check_open(self) -> None:
        """Raises: ConfigError after `close`, or in a process that was forked from the engine's."""
        self._turns.check_open()

    def close(self) -> None:
        """Stop the threads and free the memory, once other threads' calls have ended."""
        self._turns.finish(self._engine.close)

    def run(self, requests: Sequence[Request], apply: Callable[[SequenceOutput], None]) -> None:
        """Plan all requests together, run them, and hand every output to `apply`."""
        tree = PrefixTree.from_flat(flatten(request.prompt_token_ids for request in requests))
        table = table_of(requests)
        with self._turns.turn():
            self._calibrate(lambda: tree, table)
            plan = make_plan(tree, table, self._cost, seed=self._seed)
            for output in run_planned(self._engine, requests, plan, self._policy):
                apply(output)

    def run_windows(self, windows: Iterator[Window], assembler: OutputAssembler) -> Generator[SequenceOutput]:
        """Run requests window by window; other calls may come between two outputs, and end this one."""
        if (first := next(windows, None)) is not None:
            prompts, table = first.prompts, first.table
            with self._turns.turn():
                self._calibrate(lambda: PrefixTree.from_flat(prompts), table)
            windows = chain([first], windows)
        outputs = run_windowed(self._engine, assembler, windows, self._cost, self._policy)
        try:
            while (output := self._next_of(outputs)) is not None:
                yield output
        finally:
            self._turns.release(outputs.close)

    def _next_of(self, outputs: Iterator[SequenceOutput]) -> SequenceOutput | None:
        with self._turns.turn():
            return next(outputs, None)

    def _calibrate(self, prefixes: Callable[[], PrefixTree], table: RequestTable) -> None:
        """Measure the machine if this is its first long call, and plan with the result from now on."""
        if self._measured is not None:
            return
        spec, config = self._spec, self._config

        def expected_s() -> float:
            cost, tree = built_in_cost(spec, config.num_threads, config.dtype, config.kv_dtype), prefixes()
            return expected_work_s(cost, table, tree.num_prompt_tokens - tree.num_unique_tokens)

        self._measured = calibrate_executor(self._executor, config, expected_s, self._note)
        if self._measured is not None:
            self._cost = self._cost_now()

    def _cost_now(self) -> CostModel:
        config = self._config
        return cost_of(
            self._spec, config.num_threads, self._note, config.dtype, config.kv_dtype, self._measured, config.overlap
        )

"""What a job on a table would be like: its plan without a run, and a sample of rows that is answered first.

A sample is a part of the job itself: its answers are in the journal, and the whole job does not ask those rows again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np

from blendserve.dialect.endpoint import Choice
from blendserve.dialect.extras import Extras
from blendserve.dialect.rows import error_row, finished_choice, key_of, output_row, served_row
from blendserve.engines.base import Engine
from blendserve.errors import BlendServeError
from blendserve.job.batch_input import read_lines
from blendserve.job.job import JobReport
from blendserve.job.pending import PendingRequests
from blendserve.planner.base import Int64s, RequestTable
from blendserve.planner.plan import Plan, make_plan
from blendserve.request import SequenceOutput
from blendserve.tables.answers import Answer
from blendserve.tables.door import RowLines
from blendserve.tables.mapping import TableJob, check_served, run_table
from blendserve.tables.recipe import RowRequests
from blendserve.tables.reorder import FieldOrders, best_order, order_fields, read_fields
from blendserve.tables.source import TableSource


@dataclass(frozen=True, slots=True)
class FieldAdvice:
    """An order of columns that shares more. `per_row`: each row has its own. Units: parts of the columns' text."""

    order: tuple[str, ...]
    shared: float
    shared_before: float
    per_row: bool


@dataclass(frozen=True, slots=True)
class TablePlan:
    """A job on a table before it runs. `plan` is None where no row can be asked."""

    num_rows: int
    refused_by_code: Mapping[str, int]
    plan: Plan | None
    advice: FieldAdvice | None


def plan_table(job: TableJob, engine: Engine) -> TablePlan:
    """Render and tokenize every row, and plan the requests. Nothing is answered. Raises: ConfigError."""
    requests = job.requests()
    check_served(job.recipe, requests, engine.served)
    order = job.order(requests)
    lines = RowLines(job.source, requests, engine.served, order)
    with read_lines(lines, engine.codec, engine.served.max_model_len) as (pending, refused):
        plan = engine.plan(pending) if len(pending) else None
        advice = None if order is not None else advise(job.source, requests)
        return TablePlan(lines.num_lines, dict(refused), plan, advice)


def advise(source: TableSource, requests: RowRequests) -> FieldAdvice | None:
    """A better order of the columns of a prompt; None where there is none."""
    if len(requests.fields) > 1:
        orders: FieldOrders = order_fields(read_fields(source, requests.fields))
        found = FieldAdvice(requests.fields, orders.shared, orders.shared_before, per_row=True)
    elif len(requests.named) > 1:
        found = FieldAdvice(*best_order(read_fields(source, requests.named)), per_row=False)
    else:
        return None
    return found if found.shared > found.shared_before else None


@dataclass(slots=True)
class SampledRow:
    """One row of a sample: its number, from 1, its name, what was asked of, and what came."""

    number: int
    name: str
    answer: Answer
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """Answered rows, and what follows for all that are left with them. Units: seconds, tokens.

    `num_left` counts the requests that the job had to answer, the sample included. `sample_s` is the time of the run
    alone, without that of loading and planning. `time_s` is that of all. `is_simulated`: it comes from simulations of
    both, corrected by what the sample took. Otherwise it is the time of the sample times the work of all over its own:
    too long, as a few rows leave an engine half empty.
    """

    rows: tuple[SampledRow, ...]
    num_left: int
    prompt_tokens: int
    shared_tokens: int
    output_tokens: float
    time_s: float
    sample_s: float
    is_simulated: bool = False


class _SampleAnswered(BlendServeError):
    """Ends a job behind its sample."""


_TRUSTED_S = 5.0

Simulate = Callable[[Plan], float | None]
"""The time of a planned run on the engine's machine. Units: seconds; None where nothing is known of the machine."""


def run_sample(
    job: TableJob, engine: Engine, policy: str, num_rows: int, simulate: Simulate = lambda _: None
) -> Sample | JobReport:
    """Answer rows that are drawn evenly over the plan. Returns: the report where nothing is left to answer.

    Raises: as `run_table`.
    """
    columns = job.columns()
    taken = _Taken(engine, policy, num_rows)
    try:
        return run_table(job, engine, policy, generate=taken.generate)
    except _SampleAnswered:
        rows = [SampledRow(number, name, columns.read(body)) for number, name, body in sorted(taken.rows)]
        _fill_columns(job.source, job.requests().columns, rows)
        return taken.sample(tuple(rows), simulate)


def _fill_columns(source: TableSource, columns: Sequence[str], rows: Sequence[SampledRow]) -> None:
    """Look up what was asked of. Mutates: `rows`, which are in the order of their numbers."""
    left = iter(rows)
    row, first = next(left, None), 1
    for _, _, batch in source.batches(columns):
        while row is not None and row.number < first + batch.num_rows:
            row.columns = batch.slice(row.number - first, 1).to_pylist()[0]
            row = next(left, None)
        first += batch.num_rows
        if row is None:
            return


class _Taken:
    """The sample of a run, as its answers come."""

    def __init__(self, engine: Engine, policy: str, num_rows: int) -> None:
        self.rows: list[tuple[int, str, bytes]] = []
        self._engine, self._policy, self._num_rows = engine, policy, num_rows
        self._plan: Plan | None = None
        self._picked: Int64s = np.zeros(0, np.int64)
        self._num_output_tokens: dict[int, int] = {}

    def generate(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        plan = self._plan = self._engine.plan(pending)
        order = np.asarray(plan.schedule.order)
        places = np.linspace(0, len(order) - 1, min(self._num_rows, len(order))).round().astype(np.int64)
        self._picked = np.sort(order[np.unique(places)])
        part = PendingRequests(pending.store, pending.numbers[self._picked])
        for output in self._engine.generate(part, self._policy):
            self._note(part, output)
            yield replace(output, index=int(self._picked[output.index]))
        self._end()

    def sample(self, rows: tuple[SampledRow, ...], simulate: Simulate) -> Sample:
        assert self._plan is not None, "a sample was planned"
        plan, run_s = self._plan, self._engine.times.run_s
        outputs = self._outputs(plan)
        time_s = self._simulated_s(plan, outputs, run_s, simulate)
        work = plan.schedule.compute_s + plan.schedule.memory_s
        return Sample(
            rows=rows,
            num_left=plan.num_requests,
            prompt_tokens=plan.tree.num_prompt_tokens,
            shared_tokens=round(plan.planned_sharing * plan.tree.num_prompt_tokens),
            output_tokens=float(outputs.sum()),
            time_s=run_s * float(work.sum()) / float(work[self._picked].sum()) if time_s is None else time_s,
            sample_s=run_s,
            is_simulated=time_s is not None,
        )

    def _outputs(self, plan: Plan) -> Int64s:
        """Output tokens of all requests: as planned, but longer or shorter by as much as those of the sample were."""
        expected = plan.expected_output_tokens
        ratio = sum(self._num_output_tokens.values()) / max(1e-9, float(expected[self._picked].sum()))
        known, longest = plan.table.known_output_tokens, np.maximum(plan.table.max_output_tokens, 1)
        guessed = np.clip(np.rint(expected * ratio), 1, longest)
        return np.where(known >= 0, known, guessed).astype(np.int64)

    def _simulated_s(self, plan: Plan, outputs: Int64s, run_s: float, simulate: Simulate) -> float | None:
        """The simulated time of all requests, times what the sample took over its own simulated time. Of a short
        sample, the slow start weighs most: so the simulation counts as `_TRUSTED_S` seconds that came true."""
        answered = [self._num_output_tokens.get(at, 1) for at in range(len(self._picked))]
        of_sample = simulate(_with_lengths(plan, np.maximum(answered, 1), self._picked))
        of_all = simulate(_with_lengths(plan, outputs)) if of_sample else None
        if of_all is None or not of_sample:
            return None
        return of_all * (run_s + _TRUSTED_S) / (of_sample + _TRUSTED_S)

    def _note(self, part: PendingRequests, output: SequenceOutput) -> None:
        """Keep the row that the job will have for this answer."""
        store, number = part.store, int(part.numbers[output.index])
        row = int(store.line_of_request[number])
        line = store.line(row)
        self._num_output_tokens[output.index] = output.num_output_tokens
        if output.response is not None:
            body = served_row(line, output.response)
        elif output.error is not None:
            body = error_row(line.line_number, line.custom_id, output.error)
        else:
            extras, key = Extras.from_bytes(store.body(row)), key_of(line.line_number, line.custom_id)
            choice = Choice(line, key, 0, store.prompt_of(number), output, extras, self._engine.codec)
            body = output_row(line, extras, [finished_choice(choice)], self._engine.served.name, 0)
        self.rows.append((line.line_number, line.custom_id, body))

    def _end(self) -> NoReturn:
        raise _SampleAnswered("the sample is answered")


def _with_lengths(plan: Plan, outputs: Int64s, rows: Int64s | None = None) -> Plan:
    """The plan of all requests, or of some (ascending), whose answers have these lengths."""
    table, tree = plan.table, plan.prompt_tree
    at = np.arange(len(table)) if rows is None else rows
    known = RequestTable(table.num_prompt_tokens[at], table.max_output_tokens[at], outputs)
    return make_plan(tree if rows is None else tree.restrict(rows), known, plan.cost)

"""A whole job from table to table, on an open engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blendserve.dialect.passthrough import parse_remote_line
from blendserve.dialect.schema import ServedModel, parse_line
from blendserve.dialect.urls import EMBEDDINGS_URL
from blendserve.engines.base import Engine
from blendserve.errors import ConfigError, RequestError
from blendserve.job.job import BatchJob, JobProgress, JobReport
from blendserve.job.run import Generate, run_job
from blendserve.job.windows import MAX_PLANNED_REQUESTS
from blendserve.tables.answers import AnswerColumns
from blendserve.tables.door import TableDoor
from blendserve.tables.layout import Layout
from blendserve.tables.recipe import Recipe, RowRequests
from blendserve.tables.reorder import ReorderedFields
from blendserve.tables.source import FileTable, TableSource
from blendserve.tables.target import make_target

_PROBE_TEXT = "text"


@dataclass(frozen=True, slots=True)
class TableJob:
    """What to ask of which table, and where its copy with the answers goes.

    `source`: an opened table. `journal`: None for a directory beside the output. `reorders_fields`: list the fields of
    each row in the order that shares most.
    """

    source: TableSource
    output: str
    recipe: Recipe
    layout: Layout = field(default_factory=Layout)
    journal: Path | None = None
    unnest: bool = False
    prefix: str = ""
    is_fresh: bool = False
    retries_failed: bool = False
    inputs: Sequence[str] = ()
    reorders_fields: bool = False

    def requests(self) -> RowRequests:
        """The recipe for the columns of this table. Raises: ConfigError when a column does not exist."""
        return RowRequests(self.recipe, self.source.schema.names)

    def order(self, requests: RowRequests) -> ReorderedFields | None:
        """Raises: ConfigError when the prompt lists no fields."""
        if not self.reorders_fields:
            return None
        if len(requests.fields) < 2:
            raise ConfigError(
                "--reorder-fields orders what {{ row_fields }} lists, and the prompt lists "
                f"{len(requests.fields)} columns that way: write {{{{ row_fields }}}} where the columns belong"
            )
        return ReorderedFields(self.source, requests.fields)

    def columns(self) -> AnswerColumns:
        """The columns that will be added. Raises: ConfigError when a name clashes."""
        return AnswerColumns(self.recipe, self.source.schema.names, unnest=self.unnest, prefix=self.prefix)


def run_table(
    job: TableJob,
    engine: Engine,
    policy: str,
    *,
    generate: Generate | None = None,
    on_progress: Callable[[JobProgress], None] | None = None,
) -> JobReport:
    """Answer every row, and write the table with the answers. The same call goes on where an earlier one stopped.

    `generate`: answers in place of the engine; it is given all rows at once, however many.

    Raises: as `run_batch` does; what does not fit the table is a ConfigError before any work.
    """
    requests, columns = job.requests(), job.columns()
    order = job.order(requests)
    check_served(job.recipe, requests, engine.served)
    places = job.source.places if isinstance(job.source, FileTable) else []
    target = make_target(job.output, job.inputs, places, job.layout, job.journal)
    door = TableDoor(job.source, requests, columns, engine.served, target, job.layout, order)
    batch_job = BatchJob(
        input_path=target.paths.input,
        output_path=target.paths.output,
        served=engine.served,
        model_identity=engine.identity,
        settings={**engine.settings, **job.recipe.settings(), **({"--reorder-fields": True} if order else {})},
        is_ordered=True,
        is_fresh=job.is_fresh,
        retries_failed=job.retries_failed,
        capacity=engine.capacity_bytes,
    )
    try:
        report = run_job(
            batch_job,
            engine.codec,
            generate or (lambda pending: engine.generate(pending, policy)),
            door=door,
            on_progress=on_progress,
            max_planned=MAX_PLANNED_REQUESTS if generate is None else None,
        )
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(target.paths.output), target.shown)) from error
    return replace(
        report,
        output_path=target.shown,
        errors_path=target.shown if report.num_failed else None,
        notes=(*report.notes, *((str(order),) if order and order.found else ()), *engine.notes),
    )


def check_served(recipe: Recipe, requests: RowRequests, served: ServedModel) -> None:
    """Raises: ConfigError when every row would be refused: for a parameter, a kind of request, or want of a model."""
    if served.is_remote and served.accepts_any_name and "model" not in {*recipe.params, *recipe.param_columns}:
        raise ConfigError("rows name no model, so a server has to be told which one: give --model NAME")
    if not served.is_remote and requests.url not in served.urls:
        wanted = "embeddings" if requests.url == EMBEDDINGS_URL else "text"
        raise ConfigError(
            f"this engine does not answer {requests.url} ({wanted}); it answers {', '.join(served.urls)}: choose "
            "another engine or model"
        )
    probe: dict[str, Any] = {**requests.fixed}
    if requests.url == EMBEDDINGS_URL:
        probe["input"] = _PROBE_TEXT
    else:
        probe["messages"] = [{"role": "user", "content": _PROBE_TEXT}]
    value = {"custom_id": "probe", "method": "POST", "url": requests.url, "body": probe}
    try:
        (parse_remote_line if served.is_remote else parse_line)(value, 1, served)
    except RequestError as error:
        raise ConfigError(f"no row could be answered: {error}") from error


def read_examples(url: str) -> tuple[Mapping[str, Any], ...]:
    """The rows of a small table of examples. Raises: ConfigError."""
    table = FileTable([url])
    rows = (row for batch in table.batches() for row in batch.rows.to_pylist())
    return tuple({name: value for name, value in row.items() if value is not None} for row in rows)


def open_table(urls: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> FileTable:
    """Files, globs, directories and URLs as one table. Raises: ConfigError."""
    listed = [urls] if isinstance(urls, str | os.PathLike) else list(urls)
    return FileTable([os.fspath(url) for url in listed])

"""`blendserve.map` and `blendserve.map_file`: tables from Python. The `map` command calls them too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Unpack

from blendserve.engines.base import Engine
from blendserve.engines.opening import open_engine
from blendserve.engines.settings import EngineSettings, HttpSettings, NativeSettings, ReplicaSettings, VllmSettings
from blendserve.errors import ConfigError
from blendserve.job.job import JobProgress, JobReport
from blendserve.planner.policies import POLICY_NAMES
from blendserve.tables.extra import require_data
from blendserve.tables.question import Question, asking, complete, recipe_of
from blendserve.tables.row_bar import RowBar

if TYPE_CHECKING:
    import pyarrow as pa

    from blendserve.tables.mapping import TableJob

DEFAULT_POLICY = "blend"
_NATIVE = NativeSettings()
OnProgress = Callable[[JobProgress], None]


@asking
def map(
    table: Any,
    *,
    engine: EngineSettings | Engine = _NATIVE,
    policy: str = DEFAULT_POLICY,
    journal: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    retry_failed: bool = False,
    progress: bool = False,
    on_progress: OnProgress | None = None,
    **question: Unpack[Question],
) -> pa.Table:
    """Answer every row of a table: the same table comes back, with columns for the answers.

    - `table`: anything with `__arrow_c_stream__` (pyarrow, Polars, DuckDB, pandas 2.2 or later, Hugging Face datasets),
      or a list of dicts.
    - `prompt`, `system`: Jinja templates over the row, such as `"Label this: {{ text }}"`. Instead of `prompt`:
      `messages`, a column of conversations; `prompt_column`, a column of prompts; or `embed`, a column of texts whose
      embeddings are wanted.
    - `schema`: the JSON schema that answers follow, as a dict or a Pydantic model; the answers are then structures.
      `unnest`: a column for each of its fields instead.
    - `examples`: answered rows to show the model first, with the columns of the prompt and the answer.
    - `params`, `param_columns`: parameters of the request by name, such as `{"max_tokens": 64}`: values, and columns.
    - `id`: a column that names rows. `column`: the name of the answer's column (default: "answer"). `prefix`: before
      the names of the other new columns.
    - `fields`: the columns that `{{ row_fields }}` in a prompt lists. `reorder_fields`: list them, row by row, in the
      order that lets rows share most of their prompts (default: false, as it changes prompts).
    - `engine`, `policy`, `on_progress`: as in `run_batch`. `progress`: show a bar, in notebooks too (default: false).
    - `journal`: a directory that keeps answers: the same call goes on after a crash, and rows that did not change
      keep their answers. None: nothing is kept. `fresh`: discard what it holds. `retry_failed`: ask rows again that
      failed for a reason that may pass.

    New columns: the answer, `error` (null where all went well), `finish_reason`, `prompt_tokens` and `output_tokens`.
    A row that cannot be answered has an error and costs nothing else. Raises: as `run_batch` does.
    """
    require_data()
    import pyarrow as pa

    from blendserve.tables.source import MemoryTable

    asked = complete(question)
    with ExitStack() as stack:
        kept = Path(journal) if journal is not None else Path(stack.enter_context(TemporaryDirectory()))
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        job = _table_job(
            asked,
            source=MemoryTable(table),
            output=str(kept / "result.arrow"),
            journal=kept / "journal",
            is_fresh=fresh,
            retries_failed=retry_failed,
        )
        note = stack.enter_context(RowBar()).note if progress and on_progress is None else on_progress
        run_job_of_table(job, engine, policy, note)
        with pa.OSFile(job.output) as file:
            return pa.ipc.open_file(file).read_all()


@asking
def map_file(
    input: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    rows_per_file: int | None = None,
    engine: EngineSettings | Engine = _NATIVE,
    policy: str = DEFAULT_POLICY,
    journal: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    retry_failed: bool = False,
    on_progress: OnProgress | None = None,
    **question: Unpack[Question],
) -> JobReport:
    """Answer every row of a table in files, and write the table with the answers to `output`.

    - `input`: parquet, CSV, JSON lines or Arrow: files, globs, directories of parts, or fsspec URLs of them.
    - `output`: a file whose name ends in its format; another name is a directory of parquet parts. Or a URL.
    - `rows_per_file`: rows of each part (default: one file, or parts of 1000000 rows).
    - `journal`: where finished answers are kept (default: the directory `OUT.journal` beside the output; a URL needs
      one).

    `prompt`, `system`, `messages`, `prompt_column`, `embed`, `schema`, `unnest`, `examples`, `params`, `param_columns`,
    `id`, `fields`, `reorder_fields`, `column`, `prefix`, `engine`, `policy`, `fresh`, `retry_failed` and `on_progress`:
    as in `map`. The same call goes on where an earlier one stopped. Raises: as `run_batch` does.
    """
    require_data()
    from blendserve.tables.mapping import open_table

    listed = [input] if isinstance(input, str | os.PathLike) else list(input)
    job = _table_job(
        complete(question),
        rows_per_file,
        source=open_table(listed),
        output=os.fspath(output),
        journal=None if journal is None else Path(journal),
        is_fresh=fresh,
        retries_failed=retry_failed,
        inputs=[os.fspath(one) for one in listed],
    )
    return run_job_of_table(job, engine, policy, on_progress)


def _table_job(asked: Question, rows_per_file: int | None = None, **fields: Any) -> TableJob:
    from blendserve.tables.layout import Layout
    from blendserve.tables.mapping import TableJob

    return TableJob(
        recipe=recipe_of(asked),
        layout=Layout.of(fields["output"], rows_per_file=rows_per_file),
        unnest=asked["unnest"],
        prefix=asked["prefix"],
        reorders_fields=asked["reorder_fields"],
        **fields,
    )


def run_job_of_table(
    job: TableJob,
    engine: EngineSettings | Engine,
    policy: str,
    on_progress: OnProgress | None = None,
) -> JobReport:
    """Run on an open engine, or on one that is opened for this job. Raises: ConfigError for an unknown policy."""
    from blendserve.tables.mapping import run_table

    if policy not in POLICY_NAMES:
        raise ConfigError(f"unknown policy {policy!r}; known: {', '.join(POLICY_NAMES)}")
    if not isinstance(engine, NativeSettings | VllmSettings | HttpSettings | ReplicaSettings):
        return run_table(job, engine, policy, on_progress=on_progress)
    with closing(open_engine(engine)) as opened:
        return run_table(job, opened, policy, on_progress=on_progress)

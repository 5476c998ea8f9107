"""`blendserve.map` and `blendserve.map_file`: tables from Python. The `map` command calls them too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from blendserve.engines.base import Engine
from blendserve.engines.opening import open_engine
from blendserve.engines.settings import EngineSettings, HttpSettings, NativeSettings, ReplicaSettings, VllmSettings
from blendserve.errors import ConfigError
from blendserve.job.job import JobProgress, JobReport
from blendserve.planner.policies import POLICY_NAMES
from blendserve.tables.extra import require_data

if TYPE_CHECKING:
    import pyarrow as pa

    from blendserve.tables.mapping import TableJob
    from blendserve.tables.recipe import Recipe

DEFAULT_POLICY = "blend"
_NATIVE = NativeSettings()
OnProgress = Callable[[JobProgress], None]


def map(
    table: Any,
    *,
    prompt: str | None = None,
    system: str | None = None,
    messages: str | None = None,
    prompt_column: str | None = None,
    embed: str | None = None,
    schema: Any = None,
    unnest: bool = False,
    examples: Iterable[Mapping[str, Any]] = (),
    params: Mapping[str, Any] | None = None,
    param_columns: Mapping[str, str] | None = None,
    id: str | None = None,
    fields: Iterable[str] = (),
    reorder_fields: bool = False,
    column: str = "answer",
    prefix: str = "",
    engine: EngineSettings | Engine = _NATIVE,
    policy: str = DEFAULT_POLICY,
    journal: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    retry_failed: bool = False,
    progress: bool = False,
    on_progress: OnProgress | None = None,
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

    from blendserve.tables.mapping import TableJob
    from blendserve.tables.source import MemoryTable

    recipe = make_recipe(
        prompt, system, messages, prompt_column, embed, schema, examples, params, param_columns, id, fields, column
    )
    with ExitStack() as stack:
        kept = Path(journal) if journal is not None else Path(stack.enter_context(TemporaryDirectory()))
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        job = TableJob(
            source=MemoryTable(table),
            output=str(kept / "result.arrow"),
            recipe=recipe,
            layout=_layout(str(kept / "result.arrow")),
            journal=kept / "journal",
            unnest=unnest,
            prefix=prefix,
            is_fresh=fresh,
            retries_failed=retry_failed,
            reorders_fields=reorder_fields,
        )
        note = stack.enter_context(RowBar()).note if progress and on_progress is None else on_progress
        run_job_of_table(job, engine, policy, note)
        with pa.OSFile(job.output) as file:
            return pa.ipc.open_file(file).read_all()


class RowBar:
    """A bar of answered rows with tokens and the time that is left: in a notebook, a widget where there are any."""

    def __init__(self) -> None:
        self._bar: Any = None

    def note(self, progress: JobProgress) -> None:
        """Take the job's count of what is done."""
        from tqdm.auto import tqdm

        if self._bar is None:
            self._bar = tqdm(total=progress.num_requests, unit="row")
        self._bar.n = progress.num_done
        tokens = f"{progress.num_prompt_tokens} tokens in, {progress.num_output_tokens} out"
        self._bar.set_postfix_str(tokens, refresh=False)
        self._bar.update(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()


def map_file(
    input: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    prompt: str | None = None,
    system: str | None = None,
    messages: str | None = None,
    prompt_column: str | None = None,
    embed: str | None = None,
    schema: Any = None,
    unnest: bool = False,
    examples: Iterable[Mapping[str, Any]] = (),
    params: Mapping[str, Any] | None = None,
    param_columns: Mapping[str, str] | None = None,
    id: str | None = None,
    fields: Iterable[str] = (),
    reorder_fields: bool = False,
    column: str = "answer",
    prefix: str = "",
    rows_per_file: int | None = None,
    engine: EngineSettings | Engine = _NATIVE,
    policy: str = DEFAULT_POLICY,
    journal: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    retry_failed: bool = False,
    on_progress: OnProgress | None = None,
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
    from blendserve.tables.mapping import TableJob, open_table

    listed = [input] if isinstance(input, str | os.PathLike) else list(input)
    job = TableJob(
        source=open_table(listed),
        output=os.fspath(output),
        recipe=make_recipe(
            prompt, system, messages, prompt_column, embed, schema, examples, params, param_columns, id, fields, column
        ),
        layout=_layout(os.fspath(output), rows_per_file),
        journal=None if journal is None else Path(journal),
        unnest=unnest,
        prefix=prefix,
        is_fresh=fresh,
        retries_failed=retry_failed,
        reorders_fields=reorder_fields,
        inputs=[os.fspath(one) for one in listed],
    )
    return run_job_of_table(job, engine, policy, on_progress)


def make_recipe(
    prompt: str | None,
    system: str | None,
    messages: str | None,
    prompt_column: str | None,
    embed: str | None,
    schema: Any,
    examples: Iterable[Mapping[str, Any]],
    params: Mapping[str, Any] | None,
    param_columns: Mapping[str, str] | None,
    id: str | None,
    fields: Iterable[str],
    column: str,
) -> Recipe:
    """What these parameters of `map` ask. Raises: ConfigError."""
    from blendserve.tables.recipe import Recipe

    return Recipe(
        prompt=prompt,
        system=system,
        messages_column=messages,
        prompt_column=prompt_column,
        embed_column=embed,
        examples=tuple(examples),
        params=dict(params or {}),
        param_columns=dict(param_columns or {}),
        schema=schema_of_model(schema),
        id_column=id,
        fields=tuple(fields),
        answer=column,
    )


def schema_of_model(schema: Any) -> Mapping[str, Any] | None:
    """A JSON schema, or that of a Pydantic model. Raises: ConfigError for anything else."""
    if schema is None or isinstance(schema, Mapping):
        return schema
    if callable(make := getattr(schema, "model_json_schema", None)):
        found: Mapping[str, Any] = make()
        return found
    raise ConfigError(f"schema is a {type(schema).__name__}; it must be a JSON schema (a dict) or a Pydantic model")


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


def _layout(output: str, rows_per_file: int | None = None) -> Any:
    from blendserve.tables.layout import Layout

    return Layout.of(output, rows_per_file=rows_per_file)

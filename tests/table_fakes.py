"""An engine of hashes for tables, and tables to ask it about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from batch_fakes import SERVED, FakeCodec, FakeEngine

from blendserve.dialect.schema import ServedModel
from blendserve.engines.base import EngineStatus, EngineTimes
from blendserve.job.job import JobReport
from blendserve.job.pending import PendingRequests
from blendserve.planner.plan import Plan
from blendserve.request import SequenceOutput
from blendserve.tables.layout import Layout
from blendserve.tables.mapping import TableJob, open_table, run_table
from blendserve.tables.recipe import Recipe

PROMPT = Recipe(prompt="Say {{ text }}", params={"max_tokens": 6})


class TableEngine:
    """An `Engine` around a fake that yields outputs."""

    identity = "tiny@1"
    capacity_bytes = 0
    notes: tuple[str, ...] = ()
    times = EngineTimes()
    stats = None

    def __init__(self, fake: Any = None, served: ServedModel = SERVED, **settings: Any) -> None:
        self.fake = fake or FakeEngine()
        self.served = served
        self.codec = FakeCodec()
        self.settings = settings

    def status(self) -> EngineStatus | None:
        return None

    def plan(self, pending: PendingRequests) -> Plan:
        raise NotImplementedError

    def generate(self, pending: PendingRequests, policy: str) -> Iterator[SequenceOutput]:  # noqa: ARG002  # one order
        yield from self.fake(pending)

    def close(self) -> None: ...


class TextEngine:
    """Answers every prompt with `text_of(prompt)`, cut at `max_tokens`."""

    def __init__(self, text_of: Any) -> None:
        self._text_of = text_of

    def __call__(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        for row in range(len(pending)):
            request = pending[row]
            data = self._text_of(bytes(request.prompt_token_ids.tolist()).decode()).encode()
            is_cut = len(data) > request.max_output_tokens
            tokens = np.frombuffer(data, np.uint8)[: request.max_output_tokens].astype(np.int32)
            yield SequenceOutput(
                index=row,
                token_ids=tokens if is_cut else np.append(tokens, np.int32(0)),
                finish_reason="length" if is_cut else "stop",
                num_prompt_tokens=request.num_prompt_tokens,
                num_cached_tokens=0,
            )


def table_of(num_rows: int) -> Any:
    """Texts, some of them null, beside columns of other types."""
    return pa.table(
        {
            "id": pa.array(range(num_rows), pa.int32()),
            "text": [None if row % 10 == 7 else f"word {row % 25}" for row in range(num_rows)],
            "tags": [[{"name": str(row)}] for row in range(num_rows)],
        }
    )


def write_parquet(path: Path, table: Any, row_group_size: int = 7) -> Path:
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def run_map(
    source: Path | list[Path], output: Path, recipe: Recipe = PROMPT, engine: TableEngine | None = None, **fields: Any
) -> JobReport:
    """`run_table` on files, as the command does it."""
    inputs = [str(one) for one in (source if isinstance(source, list) else [source])]
    layout = Layout.of(str(output), fields.pop("format", None), fields.pop("rows_per_file", None))
    job = TableJob(open_table(inputs), str(output), recipe, layout, inputs=inputs, **fields)
    return run_table(job, engine or TableEngine(), "blend")

"""`blendserve.map` on the tables that people have: pyarrow, Polars, DuckDB, pandas, Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from batch_fakes import FakeEngine, stop_after
from table_fakes import TableEngine, run_map, table_of, write_parquet

import blendserve
from blendserve.errors import ConfigError, ExecutorError

ROWS = [{"text": f"word {row}", "x": row} for row in range(20)]
PARAMS = {"max_tokens": 6, "seed": 1}


def from_polars() -> Any:
    return pytest.importorskip("polars").DataFrame(ROWS)


def from_duckdb() -> Any:
    return pytest.importorskip("duckdb").sql("select 'word ' || range as text, range as x from range(20)")


def from_pandas() -> Any:
    return pytest.importorskip("pandas").DataFrame(ROWS)


def from_datasets() -> Any:
    datasets = pytest.importorskip("datasets")
    backwards = datasets.Dataset.from_list(ROWS[::-1])
    return backwards.select(range(len(ROWS) - 1, -1, -1))


def from_arrow() -> Any:
    return pa.Table.from_pylist(ROWS)


def from_batches() -> Any:
    table = pa.Table.from_pylist(ROWS)
    return pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=7))


@pytest.mark.parametrize(
    "make", [from_arrow, from_batches, from_polars, from_duckdb, from_pandas, from_datasets, lambda: ROWS]
)
def test_every_kind_of_table_gives_the_same_answers(make: Callable[[], Any]) -> None:
    found = blendserve.map(make(), prompt="Say {{ text }}", params=PARAMS, engine=TableEngine())
    expected = blendserve.map(ROWS, prompt="Say {{ text }}", params=PARAMS, engine=TableEngine())
    assert found.select(["text", "x"]).to_pylist() == ROWS
    assert found["answer"].to_pylist() == expected["answer"].to_pylist()
    assert found["error"].null_count == 20


def test_polars_takes_the_result_back() -> None:
    polars = pytest.importorskip("polars")
    found = polars.from_arrow(blendserve.map(ROWS, prompt="{{ text }}", params=PARAMS, engine=TableEngine()))
    assert found.columns == ["text", "x", "answer", "error", "finish_reason", "prompt_tokens", "output_tokens"]


def test_a_journal_keeps_answers_between_calls(tmp_path: Path) -> None:
    journal = tmp_path / "kept"

    def answered(table: Any, engine: TableEngine) -> Any:
        return blendserve.map(table, prompt="Say {{ text }}", params=PARAMS, engine=engine, journal=journal)

    with pytest.raises(ExecutorError):
        answered(ROWS, TableEngine(stop_after(5, ExecutorError("gone"))))
    second, third = TableEngine(), TableEngine()
    first = answered(ROWS, second)
    grown = answered([{"text": "new", "x": 0}, *ROWS], third)
    assert (second.fake.num_answers, third.fake.num_answers) == (15, 1)
    assert grown["answer"].to_pylist()[1:] == first["answer"].to_pylist()
    assert answered(ROWS, TableEngine()).equals(first)
    with pytest.raises(ConfigError, match="belongs to another job"):
        blendserve.map(ROWS, prompt="Sing", engine=TableEngine(), journal=journal)


def test_files_are_mapped_as_the_command_does_it(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", table_of(20))
    run_map(source, tmp_path / "command.jsonl")
    report = blendserve.map_file(
        source, tmp_path / "python.jsonl", prompt="Say {{ text }}", params={"max_tokens": 6}, engine=TableEngine()
    )
    assert report.num_succeeded == 18
    assert (tmp_path / "python.jsonl").read_bytes() == (tmp_path / "command.jsonl").read_bytes()


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="the table is a int; it must be something with __arrow_c_stream__"):
        blendserve.map(3, prompt="x", engine=TableEngine())
    with pytest.raises(ConfigError, match="unknown policy 'best'"):
        blendserve.map(ROWS, prompt="x", engine=TableEngine(), policy="best")
    with pytest.raises(ConfigError, match="two columns named a"):
        blendserve.map(pa.table([[1], [2]], names=["a", "a"]), prompt="x", engine=TableEngine())


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    blendserve.map(
        ROWS,
        prompt="x",
        engine=TableEngine(FakeEngine()),
        on_progress=lambda progress: seen.append((progress.num_done, progress.num_requests)),
    )
    assert seen[0] == (0, 20)
    assert seen[-1] == (20, 20)


@pytest.mark.filterwarnings("ignore::tqdm.TqdmWarning")
def test_a_bar_shows_rows_and_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    blendserve.map(ROWS, prompt="x", engine=TableEngine(), progress=True)
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert "tokens in, " in shown
    blendserve.map(ROWS, prompt="x", engine=TableEngine())
    assert capsys.readouterr().err == ""

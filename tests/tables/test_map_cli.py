"""`blendserve map` on a tiny model: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_fakes import batch_line, read_rows, write_lines
from table_fakes import table_of, write_parquet
from tiny_files import tiny_directory

from blendserve.cli import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


def map_args(tiny: Path, source: Path, output: Path, *extra: str) -> list[str]:
    limits = ["--kv-memory", "4MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--threads", "2"]
    question = ["--prompt", "what is {{ text }}", "--max-tokens", "5"]
    return ["map", str(source), "-o", str(output), "--model", str(tiny), *limits, *question, *extra]


def test_a_table_is_answered_and_told_of(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_parquet(tmp_path / "in.parquet", table_of(10)), tmp_path / "out.parquet"
    assert main(map_args(tiny, source, output)) == 3, "one row has an error"
    captured = capsys.readouterr()
    assert f"9 answers in {output}" in captured.out
    assert f"1 error in {output}: invalid_row 1" in captured.out
    first = pq.read_table(output)
    assert first["error"].null_count == 9
    write_parquet(source, table_of(12))
    assert main(map_args(tiny, source, output, "--json")) == 3
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_reused"], summary["num_succeeded"]) == (9, 11)
    assert pq.read_table(output).slice(0, 10).equals(first)
    write_parquet(source, table_of(13))
    assert main(map_args(tiny, source, output)) == 3
    assert f"12 answers in {output}, 11 of them kept, for rows that did not change" in capsys.readouterr().out


def test_prompt_schema_and_examples_come_from_files(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("is {{ text }} good?")
    (tmp_path / "examples.jsonl").write_text('{"text": "gold", "answer": "yes"}\n')
    source, output = write_parquet(tmp_path / "in.parquet", pa.table({"text": ["lead"]})), tmp_path / "out.jsonl"
    options = ["--prompt", f"@{tmp_path / 'prompt.txt'}", "--examples", str(tmp_path / "examples.jsonl")]
    assert main([*map_args(tiny, source, output)[:-4], *options, "--max-tokens", "3", "--param", "top_k=4"]) == 0
    assert json.loads(output.read_text())["error"] is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--prompt", "{{ txt }}"], "--prompt uses 'txt', and the table has no such column"),
        (["--prompt", "@no.txt"], "--prompt: cannot read no.txt: No such file or directory"),
        (["--column", "text"], "in a column 'text', and the table has one of that name"),
        (["--param", "top_p"], "--param top_p is not understood: write NAME=VALUE"),
        (["--schema", "{nonsense"], "--schema is no JSON"),
        (["--rows-per-file", "5"], "--rows-per-file makes a directory of parts"),
        (["--format", "csv"], "--format csv and the name of"),
        (["--param", "n=2"], "a row has one answer"),
        (["--param", "top_p=7"], "no row could be answered: top_p is 7"),
        (["--base-url", "http://x"], "--base-url is an option of the http engine"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    source = write_parquet(tmp_path / "in.parquet", table_of(3))
    assert main(map_args(tiny, source, tmp_path / "out.parquet", *extra)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(tiny: Path, tmp_path: Path) -> None:
    source, output = write_parquet(tmp_path / "in.parquet", table_of(300)), tmp_path / "out.parquet"
    arguments = [sys.executable, "-m", "blendserve", *map_args(tiny, source, output, "--param", "ignore_eos=true")]
    arguments[arguments.index("--max-tokens") + 1] = "200"
    child = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    records = tmp_path / "out.parquet.journal" / "records"
    while child.poll() is None and not (records.exists() and records.stat().st_size > 20_000):
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGINT)
    _, told = child.communicate()
    assert child.returncode == 130
    assert "run the same command again to go on" in told
    assert not output.exists()
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.returncode, done.stdout[:15]) == (3, "270 answers in "), "every tenth row is bad"


def test_without_the_extra_the_error_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("blendserve.tables.extra.find_spec", lambda name: None if name == "pyarrow" else object())
    assert main(["map", "in.parquet", "-o", str(tmp_path / "out.parquet"), "--prompt", "x"]) == 1
    told = "need pyarrow, which is not installed; from the clone: .venv/bin/pip install '.[data]'"
    assert told in capsys.readouterr().err


def test_other_commands_do_not_load_the_extra() -> None:
    code = (
        "import sys; from blendserve.cli import _parser; import blendserve; blendserve.run_batch; blendserve.map\n"
        "_parser('run'); _parser('map'); print([name for name in sys.modules if name in ('pyarrow', 'fsspec')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_texts_become_vectors_on_the_native_engine(tiny: Path, tmp_path: Path) -> None:
    """Those that `run` gives for the same texts, as a column of lists of fixed size."""
    texts = ["gold", "lead and tin", "gold"]
    source = write_parquet(tmp_path / "in.parquet", pa.table({"text": [*texts, None]}))
    limits = ["--model", str(tiny), "--kv-memory", "4MiB", "--max-num-seqs", "8", "--threads", "1", "--quiet"]
    arguments = ["map", str(source), "-o", str(tmp_path / "out.parquet"), "--embed", "text", "--column", "vector"]
    assert main([*arguments, *limits]) == 3, "a null has no vector"
    found = pq.read_table(tmp_path / "out.parquet")
    lines = [batch_line(f"r{row}", {"input": text, "encoding_format": "float"}) for row, text in enumerate(texts)]
    write_lines(tmp_path / "in.jsonl", lines)
    batch = ["run", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--ordered", *limits]
    assert main(batch) == 0
    vectors = [row["response"]["body"]["data"][0]["embedding"] for row in read_rows(tmp_path / "out.jsonl")]
    assert found.schema.field("vector").type == pa.list_(pa.float32(), len(vectors[0]))
    assert found["vector"].to_pylist() == [*(pytest.approx(vector) for vector in vectors), None]
    assert [error is None for error in found["error"].to_pylist()] == [True, True, True, False]
    assert all(tokens > 0 for tokens in found["prompt_tokens"].to_pylist()[:3])

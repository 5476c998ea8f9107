"""A job from table to table on fakes: what is written, in every format, and what costs a row only itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batch_fakes import SERVED, FakeEngine, stop_after
from table_fakes import PROMPT, TableEngine, TextEngine, run_map, table_of, write_parquet

from blendserve.dialect.extras import Abilities
from blendserve.dialect.urls import TEXT_URLS
from blendserve.errors import ConfigError, ExecutorError
from blendserve.job.pending import PendingRequests
from blendserve.request import SequenceOutput
from blendserve.tables.formats import batches_of, schema_of
from blendserve.tables.places import place_of
from blendserve.tables.recipe import Recipe

NEW = ["answer", "error", "finish_reason", "prompt_tokens", "output_tokens"]


def read(path: Path) -> Any:
    place = place_of(str(path))
    schema = schema_of(place)
    return pa.Table.from_batches(batches_of(place, schema), schema)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "in.parquet", table_of(40))


def test_all_columns_come_back_in_order_and_answers_beside_them(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.parquet"
    report = run_map(source, output)
    found, given = pq.read_table(output), table_of(40)
    assert found.select(given.column_names).equals(given)
    assert found.column_names == [*given.column_names, *NEW]
    assert (report.num_succeeded, dict(report.errors_by_code)) == (36, {"invalid_row": 4})
    for row in found.to_pylist():
        assert (row["answer"] is None) == (row["error"] is not None) == (row["text"] is None)
        assert row["text"] is None or (
            row["prompt_tokens"] == len(f"user:Say {row['text']}\n") and row["output_tokens"]
        )
    assert "say what to write instead" in found["error"][7].as_py()


def test_the_order_of_answers_does_not_matter(tmp_path: Path, source: Path) -> None:
    run_map(source, tmp_path / "forward.parquet")
    run_map(source, tmp_path / "backward.parquet", engine=TableEngine(FakeEngine("backward")))
    assert pq.read_table(tmp_path / "forward.parquet").equals(pq.read_table(tmp_path / "backward.parquet"))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl", ".csv"])
def test_every_format_is_read_and_written(tmp_path: Path, suffix: str) -> None:
    table = pa.table({"text": ["one", "zwei €", 'three, "quoted"\nlines', "x"], "code": ["007", "1", "", "2"]})
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    run_map(write_parquet(tmp_path / "in.parquet", table), first)
    run_map(first, second, Recipe(prompt="Again {{ answer }}", answer="again"), prefix="second_")
    found = read(second)
    assert found.select(["text", "code"]).equals(table)
    assert found.column_names == ["text", "code", *NEW, "again", *(f"second_{name}" for name in NEW[1:])]
    assert found["again"].null_count == 0
    if suffix == ".csv":
        assert first.read_text().startswith(
            "text,code,answer,error,finish_reason,prompt_tokens,output_tokens\none,007,"
        )
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in first.read_text().splitlines()]
        assert [row["error"] for row in rows] == [None] * 4


def test_parts_globs_and_directories_are_one_table(tmp_path: Path) -> None:
    table = table_of(40)
    parts = tmp_path / "parts"
    parts.mkdir()
    for begin in (0, 15, 30):
        write_parquet(parts / f"part-{begin:02d}.parquet", table.slice(begin, 15 if begin < 30 else 10))
    (parts / "_SUCCESS").touch()
    run_map(parts, tmp_path / "whole.parquet")
    run_map(tmp_path / "parts" / "part-*.parquet", tmp_path / "split", rows_per_file=16)
    whole, split = pq.read_table(tmp_path / "whole.parquet"), pq.read_table(tmp_path / "split")
    assert whole.select(table.column_names).equals(table)
    assert whole.equals(split)
    assert [pq.read_metadata(file).num_rows for file in sorted((tmp_path / "split").iterdir())] == [16, 16, 8]


def test_json_lines_may_lack_fields_and_mix_numbers(tmp_path: Path) -> None:
    lines = [{"text": "a", "x": 1}, {"text": "b", "x": 1.5, "when": "2020-01-01"}, {"text": "c"}]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    run_map(source, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["text"], row["x"], row["when"]) for row in rows] == [
        ("a", 1.0, None),
        ("b", 1.5, "2020-01-01"),
        ("c", None, None),
    ]


def test_a_table_without_rows_gives_its_columns(tmp_path: Path) -> None:
    run_map(write_parquet(tmp_path / "in.parquet", table_of(0)), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").column_names == ["id", "text", "tags", *NEW]


def test_a_prompt_may_need_no_column(tmp_path: Path, source: Path) -> None:
    report = run_map(source, tmp_path / "out.parquet", Recipe(prompt="A story, please"))
    assert report.num_succeeded == 40
    answers = pq.read_table(tmp_path / "out.parquet")["answer"].to_pylist()
    assert len(set(answers)) > 30, "each row is seeded by its place"


def test_parameters_come_from_columns_too(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c", "d"], "limit": pa.array([3, None, 5, -1])})
    recipe = Recipe(prompt="{{ text }}", params={"temperature": 0}, param_columns={"max_tokens": "limit"})
    run_map(write_parquet(tmp_path / "in.parquet", table), tmp_path / "out.parquet", recipe)
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["output_tokens"] for row in found] == [3, 12, 5, None]
    assert found[3]["error"].startswith("invalid_value: max_tokens is -1")


def test_conversations_and_finished_prompts_come_from_columns(tmp_path: Path) -> None:
    chats = [
        [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "Say Hi"}],
        [{"role": "wizard", "content": "Hi"}],
    ]
    as_json = [json.dumps(chat) for chat in chats]
    table = pa.table({"chat": chats, "text": ["Say Hi", "Say Hi", None], "as_json": as_json})
    source = write_parquet(tmp_path / "in.parquet", table)
    seeded: dict[str, Any] = {"params": {"seed": 1}}
    run_map(source, tmp_path / "chat.parquet", Recipe(messages_column="chat", **seeded))
    run_map(source, tmp_path / "json.parquet", Recipe(messages_column="as_json", **seeded))
    run_map(source, tmp_path / "text.parquet", Recipe(prompt_column="text", **seeded))
    chat, as_json, text = (pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("chat", "json", "text"))
    assert [row["answer"] for row in chat] == [row["answer"] for row in as_json]
    assert chat[1]["answer"] == text[1]["answer"] is not None
    assert "wizard" in chat[2]["error"]
    assert text[2]["error"].startswith("invalid_row: text is null")


def test_examples_stand_before_the_question(tmp_path: Path) -> None:
    examples = ({"text": "good", "answer": "+"}, {"text": "bad", "answer": {"sign": "-"}})
    recipe = Recipe(prompt="Label {{ text }}", system="You label", examples=examples, params={"max_tokens": 500})
    table = pa.table({"text": ["fine"]})
    echo = TableEngine(TextEngine(lambda prompt: prompt))
    run_map(write_parquet(tmp_path / "in.parquet", table), tmp_path / "out.parquet", recipe, echo)
    assert pq.read_table(tmp_path / "out.parquet")["answer"].to_pylist() == [
        'system:You label\nuser:Label good\nassistant:+\nuser:Label bad\nassistant:{"sign": "-"}\nuser:Label fine\n'
    ]


@pytest.mark.parametrize(
    ("recipe", "fields", "message"),
    [
        (Recipe(prompt="{{ txt }}"), {}, "--prompt uses 'txt', and the table has no such column; it has id, text"),
        (Recipe(prompt="{{ row['a b'] }}"), {}, "uses 'a b'"),
        (Recipe(prompt="{{ text"), {}, "is no valid template, line 1"),
        (Recipe(prompt="x", system="{{ nobody }}"), {}, "--system uses 'nobody'"),
        (Recipe(messages_column="chat"), {}, "--messages names the column 'chat'"),
        (Recipe(prompt="x", id_column="key"), {}, "--id names the column 'key'"),
        (Recipe(prompt="x", param_columns={"seed": "s"}), {}, "--param-column seed names the column 's'"),
        (Recipe(prompt="x", params={"top_p": 9}), {}, "no row could be answered: top_p is 9"),
        (Recipe(prompt="x", params={"tempratur": 1}), {}, "unknown parameter 'tempratur'"),
        (Recipe(prompt="x", answer="text"), {}, "in a column 'text', and the table has one of that name"),
        (Recipe(prompt="x", answer="error"), {}, "in a column 'error'"),
        (Recipe(prompt="x"), {"unnest": True}, "--unnest makes a column of each field"),
    ],
)
def test_what_fits_no_row_is_an_error_before_any_work(
    tmp_path: Path, source: Path, recipe: Recipe, fields: dict[str, Any], message: str
) -> None:
    engine = TableEngine()
    with pytest.raises(ConfigError) as caught:
        run_map(source, tmp_path / "out.parquet", recipe, engine, **fields)
    assert message in str(caught.value)
    assert engine.fake.num_answers == 0
    assert not (tmp_path / "out.parquet.journal").exists()


def test_an_engine_without_embeddings_says_so_before_any_work(tmp_path: Path, source: Path) -> None:
    engine = TableEngine(served=replace(SERVED, abilities=Abilities(urls=TEXT_URLS)))
    with pytest.raises(ConfigError, match="this engine does not answer /v1/embeddings"):
        run_map(source, tmp_path / "out.parquet", Recipe(embed_column="text"), engine)
    assert engine.fake.num_answers == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of --prompt, --messages, --prompt-column, --embed; none is given"),
        ({"prompt": "x", "messages_column": "y"}, "--prompt and --messages are given"),
        ({"messages_column": "y", "system": "x"}, "put the system message into them"),
        ({"messages_column": "y", "examples": ({"a": 1},)}, "put the examples into the conversations"),
        ({"embed_column": "y", "system": "z"}, "--embed takes texts as they are"),
        ({"prompt": "x", "params": {"seed": 1}, "param_columns": {"seed": "s"}}, "seed is given as a value and as a"),
        ({"prompt": "x", "params": {"n": 2}}, "a row has one answer"),
    ],
)
def test_a_recipe_is_one_question(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(**fields)
    assert message in str(caught.value)


def test_examples_have_to_fit_the_prompt(tmp_path: Path, source: Path) -> None:
    for example, message in (({"text": "x"}, "has no answer"), ({"answer": "x"}, "an example of --examples does not")):
        with pytest.raises(ConfigError, match=message):
            run_map(source, tmp_path / "out.parquet", Recipe(prompt="{{ text }}", examples=(example,)))


def test_paths_that_cannot_be_are_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub.parquet").mkdir()
    write_parquet(tmp_path / "sub" / "other.parquet", pa.table({"other": [1]}))
    for inputs, output, message in (
        (source, source, "would be one of the inputs"),
        (tmp_path / "sub", tmp_path / "sub" / "out.parquet", "would be one of the inputs"),
        (tmp_path / "*.parquet", tmp_path / "out.parquet", "would be one of the inputs"),
        (tmp_path / "no.parquet", tmp_path / "out.parquet", "there is no such file"),
        (tmp_path / "no-*.parquet", tmp_path / "out.parquet", "no file has such a name"),
        ([source, tmp_path / "sub"], tmp_path / "out.parquet", "are not parts of one table"),
        (source, tmp_path / "nowhere" / "out.parquet", "is not a directory; make it first"),
        (source, tmp_path / "sub.parquet", "is a directory, and the answers would be a file"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_map(inputs, output, Recipe(prompt="x"))


def test_what_is_no_table_says_so(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.parquet", b"no parquet", "cannot read .*a.parquet as parquet"),
        ("a.arrow", b"no arrow", "cannot read .*a.arrow as arrow"),
        ("a.jsonl", b"[1]\n", "a line is no JSON object"),
        ("b.jsonl", b'{"a": 1}\n{"a": "x"}\n', "cannot read .*b.jsonl as jsonl"),
        ("a.csv", b"a,b\n1,2\n3\n", "a row has 1 values, and the first line names 2 columns"),
        ("b.csv", b"a,a\n1,2\n", "a column name stands twice"),
        ("c.csv", b"a,b\n1,\xff\n", "cannot read .*c.csv as csv"),
        ("a.xlsx", b"", "the format of a.xlsx is not known by its name"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            run_map(tmp_path / name, tmp_path / "out.parquet", Recipe(prompt="x"))


def test_a_table_that_grew_costs_what_grew(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.parquet"
    run_map(source, output)
    grown = pa.concat_tables([table_of(40).slice(30), pa.table(table_of(43)).slice(40), table_of(40).slice(0, 30)])
    write_parquet(source, grown)
    engine = TableEngine()
    report = run_map(source, output, engine=engine)
    assert engine.fake.num_answers == 3
    assert report.num_reused == 36
    assert pq.read_table(output)["id"].to_pylist() == [*range(30, 43), *range(30)]
    assert run_map(source, output).was_complete


def test_rows_that_failed_for_a_reason_that_may_pass_are_tried_again_when_asked(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.parquet"

    def failing(pending: PendingRequests) -> Iterator[SequenceOutput]:
        for end in FakeEngine()(pending):
            is_lost = end.index % 9 == 0
            yield replace(end, finish_reason="error", error=ExecutorError("the engine died")) if is_lost else end

    first = run_map(source, output, engine=TableEngine(failing))
    assert first.retriable_by_code == {"server_error": 4}
    engine = TableEngine()
    assert run_map(source, output, engine=engine).was_complete
    again = run_map(source, output, engine=engine, retries_failed=True)
    assert engine.fake.num_answers == 4
    assert again.errors_by_code == {"invalid_row": 4}
    run_map(source, tmp_path / "whole.parquet")
    assert pq.read_table(output).equals(pq.read_table(tmp_path / "whole.parquet"))


def test_a_lost_output_is_written_again_from_the_journal(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.parquet"
    run_map(source, output)
    before = pq.read_table(output)
    output.unlink()
    engine = TableEngine()
    run_map(source, output, engine=engine)
    assert engine.fake.num_answers == 0
    assert pq.read_table(output).equals(before)


def test_another_layout_costs_no_answer(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out"
    run_map(source, output, rows_per_file=10)
    engine = TableEngine()
    run_map(source, output, rows_per_file=25, engine=engine)
    assert engine.fake.num_answers == 0
    assert len(list(output.iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out", "out.journal"]


def test_another_prompt_is_another_job(tmp_path: Path, source: Path) -> None:
    run_map(source, tmp_path / "out.parquet")
    with pytest.raises(ConfigError, match=r"belongs to another job: --prompt was Say \{\{ text \}\} "):
        run_map(source, tmp_path / "out.parquet", Recipe(prompt="Sing {{ text }}", params=PROMPT.params))


def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out.parquet").write_text("mine")
    with pytest.raises(ConfigError, match="is not of this job"):
        run_map(source, tmp_path / "out.parquet")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is not of this job"):
        run_map(source, tmp_path / "parts")


def test_a_table_that_changes_meanwhile_is_noticed(tmp_path: Path, source: Path) -> None:
    def change(count: int) -> None:
        if count == 20:
            write_parquet(source, table_of(41))

    with pytest.raises(ConfigError, match="was changed while the job ran; run the same command again"):
        run_map(source, tmp_path / "out.parquet", engine=TableEngine(FakeEngine(on_answer=change)))
    engine = TableEngine()
    run_map(source, tmp_path / "out.parquet", engine=engine)
    assert engine.fake.num_answers == 1


def test_an_interrupted_job_goes_on(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.parquet"
    with pytest.raises(ExecutorError):
        run_map(source, output, engine=TableEngine(stop_after(10, ExecutorError("gone"))))
    engine = TableEngine()
    report = run_map(source, output, engine=engine)
    assert (engine.fake.num_answers, report.num_resumed) == (26, 10)


def test_rows_are_named_by_their_file_and_place_or_by_a_column(tmp_path: Path) -> None:
    """Names seed what is sampled: a row keeps its answer when another file comes before it."""
    table = table_of(12)
    write_parquet(tmp_path / "b.parquet", table)
    run_map(tmp_path / "b.parquet", tmp_path / "alone.jsonl")
    write_parquet(tmp_path / "a.parquet", table_of(3))
    run_map([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "both.jsonl")
    alone, both = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("alone", "both"))
    assert both[3:] == alone
    by_id = Recipe(prompt="Say {{ text }}", params=PROMPT.params, id_column="id")
    shuffled = table.take([3, 1, 2, 0, 4, 5, 6, 7, 8, 9, 10, 11])
    run_map(tmp_path / "b.parquet", tmp_path / "straight.jsonl", by_id)
    run_map(write_parquet(tmp_path / "c.parquet", shuffled), tmp_path / "shuffled.jsonl", by_id)
    straight, other = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("straight", "shuffled"))
    assert sorted(straight) == sorted(other)

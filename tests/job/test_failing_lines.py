"""A line on which tokenizer or chat template fail is a row of the error file, whatever they fail with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_files import tiny_directory

from blendserve.cli import main
from blendserve.job.job import EXIT_ERROR_ROWS

FRAGILE = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
BOMB = "{% for m in messages %}{{ m.content * (10**10 if m.content == 'bomb' else 1) }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_directory(tmp_path_factory.mktemp("models") / "tiny")
    described = json.loads((directory / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [FRAGILE, described["pre_tokenizer"]]}
    (directory / "tokenizer.json").write_text(json.dumps(described))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": BOMB}))
    return directory


def test_lines_that_break_tokenizer_or_template_are_rows(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"good": "the capital", "panic": "x" * 60, "long": "x" * 50_000, "bomb": "bomb", "last": "of france"}
    lines = [
        {
            "custom_id": f"{kind} {name}",
            "method": "POST",
            "url": "/v1/chat/completions" if kind == "chat" else "/v1/completions",
            "body": {"max_tokens": 2}
            | ({"messages": [{"role": "user", "content": text}]} if kind == "chat" else {"prompt": text}),
        }
        for name, text in texts.items()
        for kind in ("chat", "text")
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    limits = ["--kv-memory", "4MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--threads", "2"]
    assert main(["run", str(source), "-o", str(output), "--model", str(model), "--quiet", *limits]) == EXIT_ERROR_ROWS
    answers = {json.loads(row)["custom_id"] for row in output.read_text().splitlines()}
    assert answers == {"chat good", "text good", "text bomb", "chat last", "text last"}
    rows = [json.loads(row) for row in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    errors = {row["custom_id"]: row["response"]["body"]["error"] for row in rows}
    assert {name: (error["code"], error["param"]) for name, error in errors.items()} == {
        "chat panic": ("invalid_value", "messages"),
        "text panic": ("invalid_value", "prompt"),
        "chat long": ("context_length_exceeded", "messages"),
        "text long": ("context_length_exceeded", "prompt"),
        "chat bomb": ("invalid_value", "messages"),
    }
    assert "Traceback" not in capsys.readouterr().err

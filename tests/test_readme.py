"""What README and docs tell people to type is what the command line takes, and the example file is valid."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from blendserve.cli import _parser, main

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "examples/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
EXAMPLE = ROOT / "examples" / "mixed.jsonl"


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every indented line that calls blendserve."""
    found = []
    for page in PAGES:
        for line in (ROOT / page).read_text().splitlines():
            match = re.match(r"    (?:.*&& )? *(?:\.venv/bin/)?(blendserve [a-z].*)", line)
            if match:
                found.append((page, match.group(1)))
    return found


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: str(value)[:60])
def test_documented_commands_are_taken(page: str, command: str) -> None:
    arguments = shlex.split(command, comments=True)[1:]
    assert callable(_parser().parse_args(arguments).command), page


def test_the_readme_shows_commands_and_python() -> None:
    text = (ROOT / "README.md").read_text()
    assert sum(page == "README.md" for page, _ in commands()) >= 6
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)
    assert "@@" not in text


def test_the_table_of_examples_counts_what_the_file_holds() -> None:
    table = re.findall(r"^\| `(\w+)-\*` \| (\d+) \|", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE)
    kinds = Counter(json.loads(line)["custom_id"].split("-")[0] for line in EXAMPLE.read_text().splitlines())
    assert {name: int(count) for name, count in table} == kinds


@pytest.mark.model
def test_every_line_of_the_example_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(EXAMPLE)]) == 0
    assert "150 lines, 150 valid" in capsys.readouterr().out


@pytest.mark.model
def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every tenth line, answers cut short: the whole file takes minutes."""
    lines = [json.loads(line) for line in EXAMPLE.read_text().splitlines()[::10]]
    for line in lines:
        line["body"] |= {"max_tokens": min(8, line["body"]["max_tokens"])}
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    assert main(["run", str(source), "-o", str(output), "--kv-memory", "256MiB", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_succeeded"], summary["errors_by_code"]) == (len(lines), {})
    answered = [json.loads(line)["custom_id"] for line in output.read_text().splitlines()]
    assert sorted(answered) == sorted(line["custom_id"] for line in lines)


@pytest.mark.model
def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out

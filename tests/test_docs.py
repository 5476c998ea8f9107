"""The documents say what the program does: generated parts are fresh, code runs, commands and options exist."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import doc_cli
import doc_errors
import doc_pages
import pytest
from batch_fakes import write_lines
from test_imports import FLOORS
from tiny_files import tiny_directory

import blendserve
from blendserve import errors
from blendserve.cli import _parser, main
from blendserve.cli.commands import EXIT_CODES, HELP_BY_COMMAND
from blendserve.engines.http.fake_server import serving
from blendserve.engines.native import engine as native_engine
from blendserve.engines.vllm import engine as vllm_engine
from blendserve.engines.vllm.fake import FakeVllm
from blendserve.models.hub import ModelFiles, resolve
from blendserve.offline import llm

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "blendserve"
PAGES = sorted(path for path in (ROOT / "README.md", ROOT / "examples" / "README.md", *ROOT.glob("docs/*.md")))
HISTORY = ("log.md", "benchmarks.md", "paper-map.md")
PUBLIC = [getattr(blendserve, name) for name in blendserve.__all__]
SETTINGS = [
    value for value in PUBLIC if inspect.isclass(value) and value.__name__.endswith(("Settings", "Params", "Limits"))
]

NOT_IN_ROWS = {"given_back", "refused", "model_not_found"}
"""Codes of errors that never reach a file: a replica gives requests back, a server's refusal has its own body, and a
file that asks for a model that is not here is refused as a whole."""
WITHOUT_EXAMPLE = {"grammar_too_complex"}
"""Codes of errors that no short line brings about."""
IN_PYTHON_ONLY = {"empty_prompt", "invalid_token_id"}
IN_TABLES_ONLY = {"invalid_row"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


# Generated parts


def test_the_page_of_the_command_line_is_fresh() -> None:
    assert doc_pages.CLI.read_text() == doc_cli.cli_page(), "run scripts/write-docs"


def test_the_tables_and_rows_of_batch_files_are_fresh() -> None:
    assert doc_pages.BATCH_FILES.read_text() == doc_pages.batch_files_page(), "run scripts/write-docs"


def test_a_changed_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doc_pages.PARTS, "parameters", lambda: "another table")
    monkeypatch.setitem(doc_pages.PARTS, "errors", lambda: "")
    assert "another table" in doc_pages.batch_files_page()


def test_every_marked_part_has_a_place() -> None:
    marked = re.findall(r"^<!-- made by scripts/write-docs: ([a-z ]+) -->$", doc_pages.BATCH_FILES.read_text(), re.M)
    assert sorted(marked) == sorted(doc_pages.PARTS)


def codes_of_source(root: Path = SOURCE) -> set[str]:
    """Codes that the source gives to errors."""
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            named = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            given = [*named, *(node.args[:1] if name in ("line_error", "_line_error", "Failure") else ())]
            found |= {
                value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)
            }
    return found


def test_every_code_of_the_source_is_explained() -> None:
    explained = doc_errors.codes_on(doc_pages.BATCH_FILES.read_text())
    found = codes_of_source()
    assert {"invalid_url", "engine_failure", "request_timeout"} <= found
    of_service = codes_of_source(SOURCE / "serve")
    assert all(f"`{code}`" in doc_pages.BATCH_FILES.read_text() for code in WITHOUT_EXAMPLE)
    assert found - NOT_IN_ROWS - WITHOUT_EXAMPLE - IN_PYTHON_ONLY - IN_TABLES_ONLY - of_service <= explained
    service_page = (ROOT / "docs" / "quickstart-serve.md").read_text()
    assert not {code for code in of_service if f"`{code}`" not in service_page}
    assert {"insufficient_memory", "server_error"} <= explained
    python_page = (ROOT / "docs" / "python-api.md").read_text()
    assert all(f"`{code}`" in python_page for code in IN_PYTHON_ONLY)
    assert all(f"`{code}`" in (ROOT / "docs" / "tables.md").read_text() for code in IN_TABLES_ONLY)


# Python


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the pages name, where the default model and vLLM are tiny ones."""
    tiny_directory(tmp_path / "my-model")
    for name in ("in", "monday", "tuesday"):
        lines = [doc_errors.line({"prompt": f"number {n}", "max_tokens": 4}, custom_id=f"r{n}") for n in range(4)]
        write_lines(tmp_path / f"{name}.jsonl", lines)
    default = ModelFiles("tiny", tmp_path / "my-model")

    def resolve_here(name: str | None, *args: Any, **kwargs: Any) -> ModelFiles:
        return default if name is None else resolve(name, *args, **kwargs)

    modules: tuple[ModuleType, ...] = (llm, native_engine)
    for module in modules:
        monkeypatch.setattr(module, "resolve", resolve_here)
    monkeypatch.setattr(vllm_engine, "InstalledVllm", FakeVllm)
    monkeypatch.setattr(vllm_engine, "prepare_environment", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_block(code: str) -> None:
    with ExitStack() as stack:
        if "http://localhost:8000/v1" in code:
            code = code.replace("http://localhost:8000/v1", stack.enter_context(serving()).base_url)
        exec(compile(code, "a page of docs/", "exec"), {"__name__": "a page of docs/"})


def num_rows(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


API_BLOCKS = blocks(ROOT / "docs" / "python-api.md", "python")


@pytest.mark.parametrize(
    "code", [code for code in API_BLOCKS if "ReplicaSettings" not in code], ids=lambda code: code[-40:]
)
def test_python_of_the_page_runs(code: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_block(code)
    assert ("print(" not in code) or capsys.readouterr().out
    for output in re.findall(r'run_batch\("in.jsonl", "(\w+\.jsonl)"', code):
        assert num_rows(workplace / output) == (0 if output == "other.jsonl" else 4)


@pytest.mark.slow
def test_python_with_replicas_runs(workplace: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.50'")
    (code,) = [code for code in API_BLOCKS if "ReplicaSettings" in code]
    run_block(code)
    assert num_rows(workplace / "replicas.jsonl") == 4


def table_after(page: Path, heading: str) -> dict[str, list[str]]:
    """Cells by the names in backticks of the first column, of the first table after a heading."""
    text = page.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    return {name: row[1:] for row in rows for name in re.findall(r"`(\w+)`", row[0])}


def test_the_table_of_sampling_params_is_complete() -> None:
    table = table_after(ROOT / "docs" / "python-api.md", "SamplingParams")
    params = blendserve.SamplingParams()
    defaults = {field.name: getattr(params, field.name) for field in fields(params)}
    assert {name: ast.literal_eval(row[0]) for name, row in table.items()} == defaults


def test_the_table_of_the_report_is_complete() -> None:
    names = {field.name for field in fields(blendserve.JobReport)} | {"num_failed", "exit_code"}
    assert set(table_after(ROOT / "docs" / "python-api.md", "JobReport")) == names


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.__name__)
def test_docstrings_of_settings_name_every_field_and_its_default(settings: type) -> None:
    text = " ".join((settings.__doc__ or "").split())
    for field in fields(settings):
        assert f"`{field.name}`" in text, field.name
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            entry = next(item for item in text.split(" - `") if f"`{field.name}`" in "`" + item)
            assert str(field.default).removesuffix(".0") in entry, f"{field.name}: {entry}"


@pytest.mark.parametrize("value", PUBLIC, ids=blendserve.__all__)
def test_everything_public_has_a_docstring(value: Any) -> None:
    assert value.__doc__
    if inspect.isfunction(value):
        doc = value.__doc__ + (blendserve.run_batch.__doc__ or "") * ("as `run_batch`" in value.__doc__)
        assert all(f"`{name}`" in doc for name in inspect.signature(value).parameters)


def test_the_tree_of_errors_is_that_of_the_classes() -> None:
    drawn = re.findall(r"^    (?:[|`]-- )?(\w+(?:Error|Interrupt|Interrupted))  ", errors.__doc__ or "", re.MULTILINE)
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert set(drawn) == classes | {"KeyboardInterrupt", "JobInterrupted"}
    assert issubclass(blendserve.JobInterrupted, KeyboardInterrupt)


# Commands


def commands(page: Path) -> Iterator[str]:
    """Command lines of the code of a page, each from its program's name on."""
    code = "\n".join(re.findall(r"^```(?:bash|sh|console|)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    code += "\n" + "\n".join(re.findall(r"^    (.*)$", page.read_text(), re.MULTILINE))
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        for part in re.split(r" && | \| |; ", line):
            found = re.search(r"(?:^|[\s/])((?:blendserve |python -m blendserve\.|bench/\w+\.py).*)", part)
            if found and "kubectl" not in found[1]:
                yield found[1]


ALL_COMMANDS = [(page, command) for page in PAGES for command in commands(page)]
OF_BLENDSERVE = [(page, command) for page, command in ALL_COMMANDS if command.startswith("blendserve ")]
OF_BENCH = [(page, command) for page, command in ALL_COMMANDS if command.startswith("bench/")]


@pytest.mark.parametrize(("page", "command"), OF_BLENDSERVE, ids=lambda value: str(value)[-60:])
def test_commands_are_taken(page: Path, command: str) -> None:
    """A variable of the shell, `$NAME`, stands for a number."""
    command = re.sub(r"\$\{?\w+\}?", "4", command.replace('"$@"', ""))
    arguments = shlex.split(re.split(r" [>2]", command)[0] if ">" in command else command, comments=True)[1:]
    if arguments and arguments[0] in HELP_BY_COMMAND:
        assert callable(_parser().parse_args(arguments).command), page


def test_commands_are_found_on_every_page_that_has_some() -> None:
    pages = {page.name for page, _ in OF_BLENDSERVE}
    assert {"README.md", "batch-files.md", "cli.md"} <= pages
    assert len(OF_BENCH) > 5


@pytest.mark.parametrize(("page", "command"), OF_BENCH, ids=lambda value: str(value)[-60:])
def test_commands_of_bench_scripts_name_existing_options(page: Path, command: str) -> None:
    script = ROOT / command.split()[0]
    assert script.is_file(), page
    source = script.read_text() + (ROOT / "bench" / "common.py").read_text()
    imported = [ROOT / "bench" / f"{name}.py" for name in re.findall(r"^from (\w+) import", source, re.MULTILINE)]
    source += "".join(path.read_text() for path in imported if path.is_file())
    for option in re.findall(r"(?<!\S)(--[a-z][a-z-]*)", command.split("#")[0]):
        assert f'"{option}"' in source, f"{page.name}: {option}"


def options_of_blendserve() -> set[str]:
    parsers = [_parser()]
    found: set[str] = set()
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            found.update(action.option_strings)
            parsers += action.choices.values() if isinstance(action.choices, dict) else ()
    return found


FOREIGN_OPTIONS = {"--faults", "--full", "--only"}  # of programs in bench/ and tests/


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_commands_in_sentences_name_existing_options(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`(--[a-z][a-z-]*)[ `]", text))
    assert named - FOREIGN_OPTIONS <= options_of_blendserve()


def test_commands_exit_with_codes_that_the_help_tells(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    told = capsys.readouterr().out
    assert (done.value.code, all(f"\n  {code} " in told for code in EXIT_CODES)) == (0, True)
    assert main(["run", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "out.jsonl")]) == 1
    with pytest.raises(SystemExit) as wrong:
        main(["run"])
    assert wrong.value.code == 2


# Design


def test_the_floors_of_the_design_are_those_of_the_imports() -> None:
    text = (ROOT / "docs" / "design.md").read_text().split("| floor | parts |", 1)[1].split("\n\n", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    floors = {floor: tuple(re.findall(r"`(\w+)`", parts)) for floor, parts in rows}
    assert floors == FLOORS
    assert list(floors) == [*reversed(FLOORS)]


def test_files_that_the_design_names_exist() -> None:
    named = set(re.findall(r"`([a-z_]+/[\w/]*\.(?:py|cpp|h))`", (ROOT / "docs" / "design.md").read_text()))
    assert len(named) > 30
    assert not [
        name for name in named if not ((ROOT if name.startswith(("csrc", "tests")) else SOURCE) / name).exists()
    ]


# Examples


def test_rows_and_lines_of_batch_files_are_json() -> None:
    for block in blocks(ROOT / "docs" / "batch-files.md", "json")[:2]:
        for line in block.splitlines():
            assert json.loads(line)["custom_id"]

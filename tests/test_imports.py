"""Imports point down: the package stands on a few floors, and no two of its parts import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "blendserve"
FLOORS = {
    "vocabulary": ("errors", "request", "config", "seeds", "host", "_native"),
    "costs": ("models", "costs"),
    "plans": ("planner", "dialect"),
    "work": ("engine", "executors", "job"),
    "engines": ("engines", "calibration"),
    "doors": ("offline", "simulator", "tables"),
    "people": ("report", "serve", "cli"),
}
"""From the ground up. A part may import its own floor and those below."""
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS.values()) for part in parts}
ENTRY = ("__init__.py", "__main__.py")


def part_of(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "blendserve":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("blendserve."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("blendserve."))


SOURCES = [path for path in sorted(SOURCE.rglob("*.py")) if path.relative_to(SOURCE).as_posix() not in ENTRY]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    assert part in FLOOR_OF, f"give {part} a place in FLOORS"
    for name in imported_parts(path):
        assert FLOOR_OF[name] <= FLOOR_OF[part], f"{path.relative_to(SOURCE)} imports {name}, which stands above {part}"


def test_no_two_parts_import_each_other() -> None:
    below: dict[str, set[str]] = {}
    for path in SOURCES:
        below.setdefault(part_of(path), set()).update(set(imported_parts(path)) - {part_of(path)})
    assert list(TopologicalSorter(below).static_order())  # raises CycleError with the circle


def test_the_executors_alone_import_the_compiled_core() -> None:
    assert {part_of(path) for path in SOURCES if "_native" in set(imported_parts(path))} == {"executors"}


def test_the_command_line_alone_knows_of_options() -> None:
    def imports_argparse(path: Path) -> bool:
        return any(
            isinstance(node, ast.Import) and node.names[0].name == "argparse"
            for node in ast.walk(ast.parse(path.read_text()))
        )

    found = {path.relative_to(SOURCE).as_posix() for path in SOURCES if imports_argparse(path)}
    assert {name for name in found if not name.startswith("cli/")} == {"engines/http/fake_server.py"}  # its own program


def test_benchmarks_and_examples_use_the_library_and_not_the_command_line() -> None:
    root = SOURCE.parent.parent
    scripts = [*(root / "bench").rglob("*.py"), *(root / "examples").rglob("*.py")]
    assert scripts
    assert not [path for path in scripts if "cli" in set(imported_parts(path))]


def test_llm_needs_no_batch_files() -> None:
    code = (
        "import sys, blendserve.offline.llm; print([name for name in sys.modules if name.startswith('blendserve.job')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_imports_without_heavy_or_optional_modules() -> None:
    """`import blendserve` stays quick: nothing of torch, transformers or the tokenizer stack is pulled in."""
    heavy = ("torch", "transformers", "ray", "vllm", "jinja2")
    code = f"import sys, blendserve; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

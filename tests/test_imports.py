"""Imports point one way: a module may import its own layer's package and the layers below, never above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "blendserve"
LAYERS = (
    ("errors",),
    ("request", "config", "seeds", "process"),
    ("outputs",),
    ("models",),
    ("cost",),
    ("hardware",),
    ("calibration",),
    ("planner", "detokenize"),
    ("workloads",),
    ("engine",),
    ("executors", "batchfile"),
    ("bounds",),
    ("adapters",),
    ("probe",),
    ("calibrate_overlap",),
    ("job", "session", "simulate", "calibrate"),
    ("disaggregated", "parallel"),
    ("report",),
    ("assembler",),
    ("llm",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def top_name(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("blendserve."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "blendserve":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("blendserve."))
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = top_name(path)
    if own.startswith("__"):
        return
    assert own in RANK, f"give {own} a place in LAYERS"
    for name in imported_names(path):
        assert name == own or RANK[name] < RANK[own], (
            f"{path.relative_to(SOURCE)} imports {name}, which is not below {own}"
        )


def test_the_package_imports_without_heavy_or_optional_modules() -> None:
    """`import blendserve` stays quick: nothing of torch, transformers or the tokenizer stack is pulled in."""
    heavy = ("torch", "transformers", "ray", "vllm", "jinja2")
    code = f"import sys, blendserve; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Simulations of `bench/paper.py` that are done, kept so that an interrupted evaluation goes on where it was.

One JSON line for each in a file that only grows; a torn last line counts for nothing. A cell is done again when the
code that it was simulated by has changed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from common import ROOT
from paper_run import SYSTEMS, Cell, Outcome

SOURCE = "src/blendserve"
SHARED = (
    *(f"costs/{name}.py" for name in ("hardware", "model_cost", "step_cost")),
    "executors/simulated.py",
    *(f"engine/{name}.py" for name in ("loop", "batcher", "blocks", "prefix_cache", "sequence", "finish", "stats")),
    *(f"simulator/{name}.py" for name in ("simulate", "bounds", "losses", "machine", "workloads/*")),
    "models/known.py",
    "planner/*.py",
)
"""What every simulation runs through, as far as figures hang on it. `engine/step.py` only names what is exchanged."""
OWN: dict[str, tuple[str, ...]] = {
    "blend": ("blend", "pace", "remaining", "horizon", "memory_gate", "reserve", "learner", "forecast"),
    "BlendServe, Alg. 3": ("paper", "ends", "forecast"),
    "replicas": ("partition", "deal", "part_time", "pace"),
}
"""Modules of the planner that act in some simulations alone. `policies.py` and `windows.py` act in none."""
IDLE = ("policies", "windows", "__init__")


def code_hash(cell: Cell, root: Path = ROOT) -> str:
    """Names the code that a cell's figures depend on, without comments, docstrings and the words of errors."""
    digest = hashlib.sha256()
    for path in code_paths(cell, root):
        digest.update(f"{path.relative_to(root)}\0{acting_hash(path)}".encode())
    return digest.hexdigest()[:12]


def code_paths(cell: Cell, root: Path = ROOT) -> list[Path]:
    """The modules that a cell's figures depend on."""
    owners = {cell.system, "replicas" if cell.num_replicas > 1 else ""}
    own = {name for owner, names in OWN.items() if owner in owners for name in names}
    elsewhere = {name for names in OWN.values() for name in names} | set(IDLE)
    paths = {
        path
        for pattern in SHARED
        for path in (root / SOURCE).glob(pattern)
        if path.parent.name != "planner" or path.stem in own or path.stem not in elsewhere
    }
    if cell.system not in SYSTEMS:
        paths.add(root / SOURCE / "simulator/disaggregated.py")
    paths.add(root / "bench/paper_run.py")
    if cell.ablation:
        paths.add(root / "bench/paper_ablation.py")
    if cell.variant:
        paths.add(root / "bench/paper_variants.py")
    return sorted(paths)


@cache
def commit_of(paths: tuple[Path, ...]) -> str:
    """The last commit that changed one of these files, and whether they have changed since."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", *map(str, paths)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%h") + (" with uncommitted changes" if git("status", "--porcelain") else "")


def simulation(cell: Cell) -> Cell:
    """What is simulated, whichever tables it goes to."""
    return replace(cell, experiment="", label="")


@cache
def acting_hash(path: Path) -> str:
    """Of a module without what does nothing."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [one for one in node.body if not _is_docstring(one)]
        elif isinstance(node, ast.Raise):
            node.exc = None
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


class CellStore:
    """The outcomes in the file at `path` of one scale, by the code that is here now. A text stands for a cell that
    cannot be, and says why.
    """

    def __init__(self, path: Path, scale: float, *, code_of: Callable[[Cell], str] = code_hash) -> None:
        self._path = path
        self._scale = scale
        self._code_of = code_of
        self._done: dict[Cell, Outcome | str] = {}
        self._commit_of: dict[Cell, str] = {}
        if path.exists():
            with path.open("rb+") as file:
                self._read(file.read().splitlines(keepends=True))
                file.truncate(self._num_bytes)

    def _read(self, lines: Iterable[bytes]) -> None:
        self._num_bytes = 0
        for line in lines:
            if not line.endswith(b"\n"):
                return
            self._num_bytes += len(line)
            values = json.loads(line)
            cell = simulation(Cell(**values["cell"]))
            if values["scale"] == self._scale and values["code"] == self._code_of(cell):
                self._commit_of[cell] = values["commit"]
                self._done[cell] = values["reason"] or Outcome(**{**values["outcome"], "cell": cell})

    def commit_of(self, cell: Cell) -> str:
        """The last commit that changed what it was simulated by."""
        return self._commit_of[simulation(cell)]

    def __contains__(self, cell: Cell) -> bool:
        return simulation(cell) in self._done

    def get(self, cell: Cell) -> Outcome | str | None:
        """None where it is not done."""
        outcome = self._done.get(simulation(cell))
        return replace(outcome, cell=cell) if isinstance(outcome, Outcome) else outcome

    def __getitem__(self, cell: Cell) -> Outcome | str:
        outcome = self.get(cell)
        if outcome is None:
            raise KeyError(cell)
        return outcome

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Simulations that are not done, in their order."""
        return list(dict.fromkeys(simulation(cell) for cell in cells if cell not in self))

    def add(self, cell: Cell, outcome: Outcome | str) -> None:
        """Keep what came of a cell."""
        cell = simulation(cell)
        reason = outcome if isinstance(outcome, str) else ""
        values = {} if isinstance(outcome, str) else {**asdict(outcome), "cell": None}
        self._commit_of[cell] = commit_of(tuple(code_paths(cell)))
        line = {
            "scale": self._scale,
            "code": self._code_of(cell),
            "commit": self._commit_of[cell],
            "cell": asdict(cell),
            "reason": reason,
            "outcome": values,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._done[cell] = outcome

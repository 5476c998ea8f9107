"""Simulations of `bench/paper.py` that are done, kept so that an interrupted evaluation goes on where it was.

One JSON line for each in a file that only grows; a torn last line counts for nothing. A cell is done again when the
code that it was simulated by has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from common import ROOT, commit
from paper_cells import Cell, Outcome

CODE = ("src/blendserve/planner", "src/blendserve/simulator", "src/blendserve/costs", "src/blendserve/engine")
CELLS = ("bench/paper_cells.py", "bench/paper_ablation.py")


def code_hash(root: Path = ROOT) -> str:
    """Names what simulated figures depend on."""
    digest = hashlib.sha256()
    for path in sorted(
        [*(path for place in CODE for path in (root / place).rglob("*.py")), *(root / p for p in CELLS)]
    ):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class CellStore:
    """The outcomes in the file at `path` of one scale, by the code that is here now. A text stands for a cell that
    cannot be, and says why.
    """

    def __init__(self, path: Path, scale: float, *, code: str | None = None) -> None:
        self._path = path
        self._key = {"scale": scale, "code": code or code_hash()}
        self._done: dict[Cell, Outcome | str] = {}
        self.commits: set[str] = set()
        """Commits at which the kept outcomes were simulated."""
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
            if self._key.items() <= values.items():
                cell = Cell(**values["cell"])
                self.commits.add(values["commit"])
                self._done[cell] = values["reason"] or Outcome(**{**values["outcome"], "cell": cell})

    def __getitem__(self, cell: Cell) -> Outcome | str:
        return self._done[cell]

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those that are not done, in their order."""
        return [cell for cell in cells if cell not in self._done]

    def add(self, cell: Cell, outcome: Outcome | str) -> None:
        """Keep what came of a cell."""
        reason = outcome if isinstance(outcome, str) else ""
        values = {} if isinstance(outcome, str) else {**asdict(outcome), "cell": None}
        line = {**self._key, "commit": commit(), "cell": asdict(cell), "reason": reason, "outcome": values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.commits.add(commit())
        self._done[cell] = outcome

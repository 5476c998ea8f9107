"""Measured runs that are done, kept so that a bench of hours can be stopped at any time and goes on where it was.

One JSON line for each in a file that only grows; a torn last line counts for nothing. A run counts only for the code,
the machine and the thing that was measured (`cell`): after a change of the engine it is measured again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, commit, machine

CODE = ("src/blendserve/planner", "src/blendserve/engine", "src/blendserve/executors", "src/blendserve/costs", "csrc")
RESULTS = ROOT / "bench" / "results"

Cell = Mapping[str, Any]
Found = dict[str, Any]


def code_hash(root: Path = ROOT, places: Sequence[str] = CODE) -> str:
    """Names the code that decides how long a run takes."""
    digest = hashlib.sha256()
    files = (path for place in places for path in (root / place).rglob("*") if path.suffix in (".py", ".cpp", ".h"))
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class RunStore:
    """The runs in the file at `path` that were made by this code on this machine."""

    def __init__(self, path: Path, *, code: str | None = None, on_machine: str | None = None) -> None:
        self._path = path
        self._key = {"code": code or code_hash(), "machine": on_machine or str(machine())}
        self._runs: dict[Hashable, list[Found]] = {}
        self.commits: set[str] = set()
        """Commits at which the kept runs were made."""
        if path.exists():
            self._read(path.read_bytes())

    def _read(self, content: bytes) -> None:
        """Keep what is whole; cut a torn last line off the file, so that the next one does not join it."""
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            with self._path.open("rb+") as file:
                file.truncate(len(content) - len(torn))
        for line in whole.splitlines():
            values = json.loads(line)
            if self._key.items() <= values.items():
                self._runs.setdefault(_name(values["cell"]), []).append(values["found"])
                self.commits.add(values["commit"])

    def runs(self, cell: Cell) -> list[Found]:
        """What was found in each run of a cell, oldest first."""
        return list(self._runs.get(_name(cell), ()))

    def add(self, cell: Cell, found: Found) -> None:
        """Keep one run of a cell."""
        here = commit()
        line = {
            **self._key,
            "commit": here,
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "cell": dict(cell),
            "found": found,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._runs.setdefault(_name(cell), []).append(found)
        self.commits.add(here)


def _name(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


class Progress:
    """How much of a bench is done, and about how long the rest takes: as long as runs so far took."""

    def __init__(self, seconds_of: Sequence[float], num_left: int) -> None:
        self._seconds = list(seconds_of)
        self.num_left = num_left

    def done(self, elapsed_s: float) -> None:
        self._seconds.append(elapsed_s)
        self.num_left -= 1

    @property
    def next_s(self) -> float:
        """About how long one more run takes; 0 where none is known."""
        return sum(self._seconds) / len(self._seconds) if self._seconds else 0.0

    def __str__(self) -> str:
        rest_s = self.num_left * self.next_s
        left = f"{self.num_left} runs left"
        return f"{left}, about {rest_s / 60:.1f} minutes" if self._seconds else left

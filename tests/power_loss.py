"""What a disk may hold after a power cut, by what was told to reach it: a directory's history, sync by sync.

POSIX promises the content of a file as of its last fsync, and the names in a directory as of its last fsync. What was
written later may be there in whole, in part or not at all, each file and directory for itself.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Names = Mapping[str, int]


@dataclass(frozen=True)
class Cut:
    """A power cut right before a sync: what is certain, and what the files hold that it would have made certain."""

    root: int
    durable_names: Mapping[int, Names]
    durable_bytes: Mapping[int, bytes]
    names: Mapping[int, Names]
    contents: Mapping[int, bytes]

    def write(self, place: Path, source: random.Random) -> None:
        """Make a state of the disk that this cut may leave."""
        self._write(self.root, place, source)

    def _write(self, directory: int, place: Path, source: random.Random) -> None:
        place.mkdir(mode=0o700, exist_ok=True)
        names = dict(self.durable_names.get(directory, {}))
        present = self.names.get(directory, {})
        for name in {*names, *present}:  # every change of a name may have reached the disk by itself
            if names.get(name) != present.get(name) and source.random() < 0.5:
                names.pop(name, None)
                if name in present:
                    names[name] = present[name]
        for name, node in names.items():
            if node in self.names or node in self.durable_names:
                self._write(node, place / name, source)
            else:
                (place / name).write_bytes(self._bytes(node, source))
                (place / name).chmod(0o600)

    def _bytes(self, node: int, source: random.Random) -> bytes:
        old = self.durable_bytes.get(node, b"")
        new = self.contents.get(node, old)  # a file without a name stays as it was
        if len(new) < len(old) or not new.startswith(old):
            return source.choice([old, new])
        grown = bytearray(new[: source.randint(len(old), len(new))])
        for page in range(len(old), len(grown), 4096):  # a page whose size is known and whose bytes never came
            if source.random() < 0.2:
                grown[page : page + 4096] = bytes(len(grown[page : page + 4096]))
        return bytes(grown)


@dataclass
class Recorder:
    """Stands in the place of `os.fsync` while something writes below `root`; `cuts` has one for every call."""

    root: Path
    cuts: list[Cut] = field(default_factory=list)
    _names: dict[int, Names] = field(default_factory=dict)
    _bytes: dict[int, bytes] = field(default_factory=dict)
    _held: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names, self._bytes = self._present()

    def cut(self) -> None:
        """Note what a power cut would leave now."""
        self.cuts.append(Cut(self.root.stat().st_ino, dict(self._names), dict(self._bytes), *self._present()))

    def fsync(self, descriptor: int) -> None:
        self.cut()
        found = os.fstat(descriptor)
        if found.st_ino not in self._held:
            self._held[found.st_ino] = os.dup(descriptor)  # so that its number is not given to another file
        if stat.S_ISDIR(found.st_mode):
            self._names[found.st_ino] = self._present()[0].get(found.st_ino, {})
        else:
            self._bytes[found.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def close(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)

    def _present(self) -> tuple[dict[int, Names], dict[int, bytes]]:
        names: dict[int, Names] = {}
        contents: dict[int, bytes] = {}
        for parent, directories, files in os.walk(self.root):
            place = Path(parent)
            names[place.stat().st_ino] = {name: (place / name).lstat().st_ino for name in (*directories, *files)}
            for name in files:
                contents[(place / name).stat().st_ino] = (place / name).read_bytes()
        return names, contents

"""Where the rows of a table go: a place of this machine, or one behind a URL, which is written here first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from blendserve.errors import ConfigError
from blendserve.job.disk import replace_durably
from blendserve.job.writer import JobPaths, check_directory, place_of
from blendserve.tables.extra import is_url
from blendserve.tables.layout import Layout, remove, replace, size_of
from blendserve.tables.places import Place, using
from blendserve.tables.places import place_of as remote_place


class Target(Protocol):
    """`paths` are those of the job; rows are written to `staged`, and `put` moves them to where they belong.

    `shown` is what the user calls the place; `size` are the bytes that stand there, None for nothing.
    """

    paths: JobPaths
    shown: str
    staged: Path

    def size(self) -> int | None: ...
    def put(self) -> None: ...


class LocalTarget:
    """A file or a directory of this machine. Raises: ConfigError when it cannot be written."""

    def __init__(self, output: str, input_path: Path, layout: Layout, journal: Path | None = None) -> None:
        path = place_of(Path(output.rstrip("/")))
        self.shown = str(path)
        self.staged = path.with_name(path.name + ".partial")
        self.paths = JobPaths(input_path, path, path, journal or path.with_name(path.name + ".journal"))
        is_file = layout.rows_per_file is None
        if path.exists() and path.is_dir() == is_file:
            kind, wanted = ("a directory", "a file") if is_file else ("a file", "a directory of parts")
            raise ConfigError(f"{path} is {kind}, and the answers would be {wanted}; choose another path")
        check_directory(path)
        if self.paths.journal.exists() and not self.paths.journal.is_dir():
            raise ConfigError(f"{self.paths.journal} must be a directory, the journal of this job; move that file away")

    def size(self) -> int | None:
        return size_of(self.paths.output)

    def put(self) -> None:
        replace(self.staged, self.paths.output, self.paths.journal / "replaced")


class RemoteTarget:
    """An object, or objects below a prefix, of another file system. `directory` is of this machine.

    Objects appear one by one. So what is about to be there is written down first: then parts that an upload has left
    behind when it was killed are known for the job's own. Raises: ConfigError when the file system is not known.
    """

    def __init__(self, output: str, input_path: Path, layout: Layout, directory: Path) -> None:
        self.shown = output.rstrip("/")
        self._place = remote_place(self.shown)
        self._is_file = layout.rows_per_file is None
        self.staged = directory / "staged" / self._place.name
        self.paths = JobPaths(input_path, self.staged, self.staged, directory / "journal")
        self._uploads_path = directory / "uploads.json"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.staged.parent.mkdir(mode=0o700, exist_ok=True)

    def size(self) -> int | None:
        present = self._present()
        uploads = self._uploads()
        known = {item for upload in uploads for item in upload.items()}
        if not present or (present not in uploads and present.items() <= known):
            return None  # nothing, or some parts of a whole
        return sum(present.values())

    def put(self) -> None:
        """Upload. An object appears as a whole. Parts of an earlier job that the new one has not are removed last."""
        files = {"": self.staged} if self._is_file else {part.name: part for part in sorted(self.staged.iterdir())}
        sizes = {name: file.stat().st_size for name, file in files.items()}
        uploads = [*self._uploads(), sizes]
        replace_durably(self._uploads_path, json.dumps(uploads).encode())
        fs = self._place.fs
        with using(self.shown, "write"):
            for name, file in files.items():
                fs.put_file(str(file), self._path_of(name))
            others = [self._path_of(name) for name in self._present() if name not in sizes]
            if others:
                fs.rm(others)
        replace_durably(self._uploads_path, json.dumps([sizes]).encode())
        remove(self.staged)

    def _path_of(self, name: str) -> str:
        return f"{self._place.path}/{name}" if name else str(self._place.path)

    def _present(self) -> dict[str, int]:
        """Bytes of the objects that are there, by name below the prefix."""
        fs, path = self._place.fs, self._place.path
        with using(self.shown, "read"):
            fs.invalidate_cache()
            if self._is_file:
                return {"": int(fs.info(path)["size"])} if fs.exists(path) else {}
            found = fs.find(path, detail=True)
            return {name[len(path) :].lstrip("/"): int(info["size"]) for name, info in found.items()}

    def _uploads(self) -> list[dict[str, int]]:
        """What uploads have made, or were making."""
        try:
            found: list[dict[str, int]] = json.loads(self._uploads_path.read_bytes())
        except FileNotFoundError:
            return []
        except ValueError:
            raise ConfigError(f"{self._uploads_path} is damaged; move it away, and the output too") from None
        return found


def make_target(
    output: str, inputs: Sequence[str], places: Sequence[Place], layout: Layout, journal: Path | None
) -> Target:
    """Raises: ConfigError when the place cannot be written, or is one that the job reads."""
    local = [Path(place.path) for place in places if place.is_local]
    input_path = local[0] if local else Path(output).parent
    if not is_url(output):
        for url in inputs:
            if not is_url(url) and _holds(url, place_of(Path(output.rstrip("/")))):
                raise ConfigError(
                    f"{output} would be one of the inputs ({url}) when the command goes on after a crash; choose "
                    "another path"
                )
        return LocalTarget(output, input_path, layout, journal)
    if any(remote_place(output).path == place.path for place in places):
        raise ConfigError(f"{output} is the input; a job never writes over what it reads: choose another path")
    if journal is None:
        raise ConfigError(
            f"{output} is not on this machine, and the journal has to be: name a directory for it with --journal DIR"
        )
    return RemoteTarget(output, input_path, layout, journal)


def _holds(url: str, path: Path) -> bool:
    """Whether an input path, glob or directory stands for `path`, or would if that existed."""
    given = place_of(Path(url.rstrip("/")))
    return given == path or fnmatchcase(str(path), str(given)) or (given.is_dir() and given in path.parents)

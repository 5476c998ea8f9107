"""A batch file behind a URL, as files of this machine: fetched before the job, uploaded when it is done.

The directory holds the input, the outputs with their journal, and what is known of uploads. Killed at any moment, the
same command goes on: a download or an upload that was not finished is made again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blendserve.errors import ConfigError
from blendserve.job.disk import create_new, replace_durably, sync_directory, writing_to
from blendserve.job.job import JobReport
from blendserve.job.places import JobFiles
from blendserve.tables.extra import is_url
from blendserve.tables.places import Place, place_of, using

_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StagedJob:
    """The files of a job on this machine; `url_by_path` tells which of them belong behind a URL, error rows first."""

    files: JobFiles
    url_by_path: Mapping[Path, str]
    directory: Path

    def publish(self, report: JobReport) -> JobReport:
        """Upload what the job has written. An object appears as a whole. Returns: the report, with URLs for paths."""
        for path, url in self.url_by_path.items():
            self._publish(path, url)
        names = {str(path.resolve()): url for path, url in self.url_by_path.items()}
        errors = report.errors_path
        return replace(
            report,
            output_path=names.get(str(Path(report.output_path).resolve()), report.output_path),
            errors_path=None if errors is None else names.get(str(Path(errors).resolve()), errors),
        )

    def check_not_taken(self) -> None:
        """Raises: ConfigError when a URL holds what the job did not write."""
        known = self._known()
        for url in self.url_by_path.values():
            size = _size_of(place_of(url))
            if size and size not in known.get(url, {}).get("sizes", ()):
                raise ConfigError(
                    f"{url} exists ({size} bytes) and is not of this job; move it away, write to another place, or "
                    "replace it with --fresh"
                )

    def _publish(self, path: Path, url: str) -> None:
        place, known = place_of(url), self._known()
        of_url = known.get(url, {"sizes": [], "done": ""})
        if not path.exists():
            if _size_of(place) in of_url["sizes"]:
                with using(url, "remove"):
                    place.fs.rm_file(place.path)
            return
        found = path.stat()
        stamp = f"{found.st_size} {found.st_mtime_ns}"
        if of_url["done"] == stamp and _size_of(place) == found.st_size:
            return
        known[url] = {"sizes": [*of_url["sizes"], found.st_size], "done": ""}
        self._remember(known)
        with using(url, "write"):
            place.fs.put_file(str(path), place.path)
        known[url]["done"] = stamp
        self._remember(known)

    def _known(self) -> dict[str, dict[str, Any]]:
        path = self.directory / "uploads.json"
        try:
            found: dict[str, dict[str, Any]] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError:
            raise ConfigError(f"{path} is damaged; move it away, and the outputs too") from None
        return found

    def _remember(self, known: Mapping[str, Any]) -> None:
        replace_durably(self.directory / "uploads.json", json.dumps(known).encode())


def stage(input: str, output: str | None, errors: str | None, directory: Path | None, *, is_fresh: bool) -> StagedJob:
    """Fetch what lies behind a URL, and find places for what belongs there. Raises: ConfigError when a URL cannot be
    used, when there is no directory, or when a URL holds what the job did not write.
    """
    if output is None:
        raise ConfigError(f"{input} is a URL: say with -o where the answers go, a file or a URL")
    if directory is None:
        urls = ", ".join(text for text in (input, output, errors) if text is not None and is_url(text))
        raise ConfigError(
            f"{urls} is not on this machine, and the journal has to be: name a directory for it with --journal DIR"
        )
    if is_url(output) and errors is None:
        errors = output.removesuffix(".jsonl") + ".errors.jsonl"
    for path in (directory, directory / "input", directory / "files"):
        with writing_to(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    url_by_path: dict[Path, str] = {}

    def local(text: str) -> Path:
        if not is_url(text):
            return Path(text)
        path = directory / "files" / place_of(text).name
        url_by_path[path] = text
        return path

    errors_path = None if errors is None else local(errors)
    output_path = local(output)
    source = _fetched(input, directory / "input") if is_url(input) else Path(input)
    staged = StagedJob(JobFiles(source, output_path, errors_path), url_by_path, directory)
    if not is_fresh:
        staged.check_not_taken()
    return staged


def _fetched(url: str, directory: Path) -> Path:
    """The file behind a URL, fetched unless this version of it is here."""
    place = place_of(url)
    path, note = directory / place.name, directory / "version.json"
    version = json.dumps([url, place.version()]).encode()
    if path.exists() and note.exists() and note.read_bytes() == version:
        return path
    partial = path.with_name(path.name + ".partial")
    with writing_to(path):
        note.unlink(missing_ok=True)
        with place.open() as source, open(create_new(partial), "wb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)
            target.flush()
            os.fsync(target.fileno())
        partial.replace(path)
        sync_directory(directory)
    replace_durably(note, version)
    return path


def _size_of(place: Place) -> int | None:
    with using(place.url, "read"):
        place.fs.invalidate_cache()
        return int(place.fs.info(place.path)["size"]) if place.fs.exists(place.path) else None

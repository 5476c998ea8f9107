"""Which files a command line means: inputs in directories, and outputs that nobody named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from blendserve.errors import ConfigError
from blendserve.job.input_file import COMPRESSED_SUFFIXES
from blendserve.job.reader import DEFAULT_LIMITS, ReadLimits

_OWN_ENDS = (".out.jsonl", ".errors.jsonl")


class JobFiles(NamedTuple):
    """Where a job reads and writes; without `errors`, error rows go beside the output."""

    input: Path
    output: Path
    errors: Path | None = None


class RunOptions(NamedTuple):
    """How a job is run, by the names of `BatchJob`."""

    is_ordered: bool = False
    is_fresh: bool = False
    retries_failed: bool = False
    reuses: bool = False
    limits: ReadLimits = DEFAULT_LIMITS


def find_inputs(paths: Sequence[Path]) -> list[Path]:
    """Files as they are; a directory stands for its batch files, by name: *.jsonl, compressed or not, but for answers
    and error rows of earlier runs.

    Raises: ConfigError when a directory holds none.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(entry for entry in path.iterdir() if _is_input(entry))
        if not inside:
            raise ConfigError(f"{path} is a directory without batch files; their names end in .jsonl or .jsonl.gz")
        found += inside
    return found


def output_for(input_path: Path, directory: Path | None = None) -> Path:
    """IN.out.jsonl for IN.jsonl or IN.jsonl.gz, beside it or in `directory`."""
    name = _without(input_path.name, *COMPRESSED_SUFFIXES)
    return (directory or input_path.parent) / (_without(name, ".jsonl", ".json") + ".out.jsonl")


def choose_outputs(inputs: Sequence[Path], output: Path | None, *, is_directory: bool = False) -> list[Path]:
    """An output for every input: a file for one, a directory for several, or beside the inputs.

    Raises: ConfigError where one file would have to hold the answers to several.
    """
    if output is None:
        return [output_for(path) for path in inputs]
    if is_directory or output.is_dir():
        if not output.is_dir():
            raise ConfigError(f"{output} is not a directory; make it first: mkdir -p {output}")
        return [output_for(path, output) for path in inputs]
    if len(inputs) == 1:
        return [output]
    raise ConfigError(
        f"{output} would hold the answers to {len(inputs)} files; give -o a directory, or leave it out: answers then "
        "stand beside each file"
    )


def _is_input(path: Path) -> bool:
    name = _without(path.name, *COMPRESSED_SUFFIXES)
    return path.is_file() and name.endswith(".jsonl") and not name.startswith(".") and not name.endswith(_OWN_ENDS)


def _without(name: str, *ends: str) -> str:
    for end in ends:
        if name.endswith(end) and name != end:
            return name.removesuffix(end)
    return name

"""Batch files behind URLs: fetched before a job and uploaded after it, with the packages of the extra `data`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blendserve.errors import ConfigError
from blendserve.tables.extra import is_url, require_data

if TYPE_CHECKING:
    from blendserve.tables.staging import StagedJob


def staged_job(
    inputs: Sequence[str], output: str | None, errors: str | None, journal: Path | None, *, is_fresh: bool
) -> StagedJob | None:
    """The files of a job of URLs, its input fetched; None where all are files of this machine. Raises: ConfigError."""
    urls = [text for text in (*inputs, output, errors) if text is not None and is_url(text)]
    if not urls:
        if journal is not None:
            raise ConfigError(f"--journal is for URLs: the journal of {inputs[0]} stands beside its output")
        return None
    if len(inputs) > 1:
        raise ConfigError(f"{urls[0]} is a URL, and these are {len(inputs)} inputs: run them one by one")
    require_data("URLs")
    from blendserve.tables.staging import stage

    return stage(inputs[0], output, errors, journal, is_fresh=is_fresh)

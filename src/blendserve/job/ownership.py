"""Whose a journal is: another user's files in it could lead anywhere, and a directory of other things is no journal."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from blendserve.errors import ConfigError


def check_own(directory: Path) -> None:
    """Raises: ConfigError where another user may have put a part of the journal there: it could lead anywhere.

    Mutates: the mode of a directory that others may look into.
    """
    paths = [directory]
    for parent, directories, files in os.walk(directory):
        paths += [Path(parent, name) for name in (*directories, *files)]
    for path in paths:
        found = path.lstat()
        reason = _foreign(found)
        if reason:
            raise ConfigError(
                f"{path} {reason}; a journal is used only by the user who began it: move it away, or write to another "
                "file (-o)"
            )
        if path == directory and stat.S_IMODE(found.st_mode) & 0o077:
            path.chmod(0o700)


def _foreign(found: os.stat_result) -> str:
    """Why a path is not surely ours, as a verb and its object; empty where it is."""
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, and you are user {os.geteuid()}"
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_IWOTH:
        return f"is a directory that everybody may write to (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def check_journal(directory: Path, lock_name: str) -> None:
    """Raises: ConfigError where a directory of that name is somebody else's: discarding a journal must not empty it."""
    if not (directory / lock_name).exists() and any(directory.iterdir()):
        raise ConfigError(
            f"{directory} is where the journal belongs, and holds other files; move them away, or write to another "
            "file (-o)"
        )

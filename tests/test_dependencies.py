"""Bounds of dependencies: each has a lowest version, and none of them is one that is known to leave a hole."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FIRST_SAFE = {"jinja2": (3, 1, 6)}
"""jinja2 before 3.1.6 lets a chat template read the environment (CVE-2025-27516)."""


def oldest_versions(project: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = runpy.run_path(str(ROOT / "scripts" / "audit"))["oldest_versions"](project)
    return found


def test_every_dependency_begins_at_a_safe_version() -> None:
    oldest = oldest_versions(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    assert len(oldest) > 20
    for name, version in FIRST_SAFE.items():
        assert tuple(map(int, oldest[name].split("."))) >= version


def test_a_dependency_without_a_lowest_version_is_an_error() -> None:
    project = {"project": {"dependencies": ["numpy"], "optional-dependencies": {}}}
    with pytest.raises(ValueError, match="no lowest version"):
        oldest_versions(project)

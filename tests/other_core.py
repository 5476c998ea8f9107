"""Puts another build of the core in the place of `blendserve._native`, before anybody has imported it."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

BUILD = Path(__file__).parent.parent / "build"


def load_core(directory: Path, remedy: str) -> None:
    """Raises: RuntimeError where the module was not built."""
    path = next(directory.glob("_native*.so"), None)
    spec = path and spec_from_file_location("blendserve._native", path)
    if not spec or not spec.loader:
        raise RuntimeError(f"there is no core in {directory}: {remedy}")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)

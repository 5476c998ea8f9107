"""A pytest plugin that runs tests on emulated AVX-512: `PYTHONPATH=tests pytest -p emulated tests/executors`.

It puts the module that scripts/build makes of SIMDe's intrinsics in the place of `blendserve._native`. Every
instruction set is then supported, on any x86-64 processor with AVX2, and slow.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

DIRECTORY = Path(__file__).parent.parent / "build" / "dev" / "emulated"


def load_emulated() -> None:
    """Raises: RuntimeError where the module was not built."""
    path = next(DIRECTORY.glob("_native*.so"), None)
    spec = path and spec_from_file_location("blendserve._native", path)
    if not spec or not spec.loader:
        raise RuntimeError(
            f"there is no emulated core in {DIRECTORY}: run scripts/build, with SIMDe installed (simde-py)"
        )
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)


load_emulated()

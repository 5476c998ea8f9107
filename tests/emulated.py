"""A pytest plugin that runs tests on emulated AVX-512: `PYTHONPATH=tests pytest -p emulated tests/executors`.

The module that scripts/build makes of SIMDe's intrinsics supports every instruction set, on any x86-64 processor with
AVX2, and is slow.
"""

from __future__ import annotations

from other_core import BUILD, load_core

load_core(BUILD / "dev" / "emulated", "run scripts/build, with SIMDe installed (simde-py)")

"""A pytest plugin that runs tests on a core built with ThreadSanitizer: scripts/test-native calls it."""

from __future__ import annotations

from other_core import BUILD, load_core

load_core(BUILD / "thread", "run scripts/build thread")

"""Tests of tables need the extra `data`; without it they are skipped, and say so."""

from __future__ import annotations

import pytest

pytest.importorskip("pyarrow", reason="tables need the extra data: pip install '.[data]'")
pytest.importorskip("fsspec", reason="tables need the extra data: pip install '.[data]'")

"""Numbers that the compiled core and Python both know are the same on both sides."""

from __future__ import annotations

from dataclasses import asdict, fields

from blendserve import _native
from blendserve.config import BLOCK_SIZE
from blendserve.costs.step_cost import OverlapCost
from blendserve.costs.stored_calibration import Calibration


def test_a_block_has_as_many_tokens() -> None:
    assert _native.BLOCK_SIZE == BLOCK_SIZE


def test_overlap_begins_with_the_same_settings() -> None:
    settings = asdict(OverlapCost())
    delays = settings.pop("interference")
    assert settings | delays == _native.DEFAULT_OVERLAP


def test_a_calibration_without_settings_means_the_same_ones() -> None:
    stored = {field.name: field.default for field in fields(Calibration)}
    settings = ("chunk_bytes", "tile_flop", "iteration_bytes", "memory_lanes")
    assert {name: stored[name] for name in settings} == {name: _native.DEFAULT_OVERLAP[name] for name in settings}

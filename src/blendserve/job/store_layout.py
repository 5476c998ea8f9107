"""How the requests of a job lie on the disk: the files of a store, and the record of a line.

Files (little endian): `tokens` int32, `prompt_ends` int64, `lines` (LINE), `custom_ids` UTF-8, `sampling` one JSON
object per distinct set of parameters, `bodies` what else the engine is told (see `BatchLine`), `urls` one endpoint per
line of text, numbered from 0.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np


class LineRecord(NamedTuple):
    """What is stored of one line, in the order of `LINE`."""

    line_number: int
    first_prompt: int
    id_offset: int
    sampling_offset: int
    body_offset: int
    body_bytes: int
    seed: int
    id_bytes: int
    sampling_bytes: int
    max_tokens: int
    num_prompts: int
    n: int
    flags: int
    digest: bytes


LINE = np.dtype(
    [
        ("line_number", "<i8"),
        ("first_prompt", "<i8"),
        ("id_offset", "<i8"),
        ("sampling_offset", "<i8"),
        ("body_offset", "<i8"),
        ("body_bytes", "<i8"),
        ("seed", "<i8"),
        ("id_bytes", "<i4"),
        ("sampling_bytes", "<i4"),
        ("max_tokens", "<i4"),
        ("num_prompts", "<i4"),
        ("n", "<i4"),
        ("flags", "<u4"),
        ("digest", "V16"),
    ]
)
LINE_STRUCT = struct.Struct("<qqqqqqqiiiiiI16s")
FILES: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<i4"),
    "prompt_ends": np.dtype("<i8"),
    "lines": LINE,
    "custom_ids": np.dtype("u1"),
    "sampling": np.dtype("u1"),
    "bodies": np.dtype("u1"),
    "urls": np.dtype("u1"),
}
HAS_SEED, HAS_KNOWN_LENGTH, EMBEDS, HAS_STRUCTURE, HAS_SCORES = 1, 2, 4, 8, 16
URL_SHIFT = 8
"""Flags of a line: the number of its URL stands above this bit."""
NO_LIMIT = -1
MAX_INTERNED_BYTES = 4 << 20
"""JSON of the parameter sets remembered at a time, which are about ten times as large: bounds memory, costs only
repeated entries in the file."""


class StoredFile(NamedTuple):
    """What one file of a store holds: its size and its hash. Units: bytes."""

    num_bytes: int
    sha256: str

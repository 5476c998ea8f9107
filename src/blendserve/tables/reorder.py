"""An order of fields for every row of a table, so that prompts which list fields begin alike as long as they can.

Greedy group recursion (GGR; Liu et al., "Optimizing LLM Queries in Relational Data Analytics Workloads",
arXiv 2403.05821, section 4): the value that saves most stands first in all rows that have it, and so on among those
rows with the other fields, and among the rest. Deviations: a hit counts its length and not the square of it, as prefill
is counted in tokens here; rows keep their places, as the planner sorts prompts anyway; functional dependencies are not
used.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from blendserve.tables.source import TableSource
from blendserve.tables.template import fields_text

Codes = NDArray[np.int64]
_MOST_PERMUTED = 4
"""Of so many fields all orders are tried."""


@dataclass(frozen=True, slots=True)
class FieldTable:
    """The values of fields as numbers: equal numbers, equal values. `lengths` are those of their texts in a prompt.

    Shapes: `codes` and `lengths` int64[num_fields, num_rows]. Units: characters.
    """

    names: tuple[str, ...]
    codes: Codes
    lengths: Codes

    @property
    def num_rows(self) -> int:
        return int(self.codes.shape[1])


@dataclass(frozen=True, slots=True)
class FieldOrders:
    """The order of fields of every row. `shared` and `shared_before` are the parts of the fields' text that need not be
    computed with it, and with the order of the table. Shapes: `places` uint8[num_rows, num_fields].
    """

    names: tuple[str, ...]
    places: NDArray[np.uint8]
    shared: float
    shared_before: float

    def __call__(self, row: int) -> Sequence[str]:
        return [self.names[place] for place in self.places[row]]


def read_fields(source: TableSource, names: Sequence[str]) -> FieldTable:
    """Read the fields of all rows: 16 bytes of memory for each of them."""
    hashes: list[list[int]] = [[] for _ in names]
    lengths: list[list[int]] = [[] for _ in names]
    parts: list[tuple[Codes, Codes]] = []

    def pack() -> None:
        parts.append((np.array(hashes, np.int64), np.array(lengths, np.int64)))
        for column in (*hashes, *lengths):
            column.clear()

    for _, _, batch in source.batches(names):
        for row in batch.to_pylist():
            for column, name in enumerate(names):
                text = fields_text(row, (name,))
                hashes[column].append(_hash(text))
                lengths[column].append(len(text))
        pack()
    pack()
    joined = np.concatenate([part for part, _ in parts], axis=1)
    codes = np.stack([np.unique(column, return_inverse=True)[1] for column in joined]).astype(np.int64)
    return FieldTable(tuple(names), codes, np.concatenate([part for _, part in parts], axis=1))


def order_fields(table: FieldTable) -> FieldOrders:
    """The best of three: the table's own order, the best one for all rows, and that of GGR for each."""
    num_fields, num_rows = table.codes.shape
    shape = (num_rows, num_fields)
    given = np.broadcast_to(np.arange(num_fields, dtype=np.uint8), shape)
    best_for_all = _by_savings(table)
    for_all = np.broadcast_to(np.array(best_for_all, np.uint8), shape)
    shared, places = max(
        ((shared_part(table, places), places) for places in (given, for_all, _recursive(table, best_for_all))),
        key=lambda found: found[0],
    )
    return FieldOrders(table.names, places, shared, shared_part(table, given))


def _recursive(table: FieldTable, best_for_all: Sequence[int]) -> NDArray[np.uint8]:
    """GGR. Rows that share nothing any more list their other fields in the best order for all rows."""
    num_fields, num_rows = table.codes.shape
    places = np.zeros((num_rows, num_fields), np.uint8)
    todo: list[tuple[Codes, tuple[int, ...]]] = [(np.arange(num_rows), ())]
    while todo:
        rows, before = todo.pop()
        left = [field for field in best_for_all if field not in before]
        if len(rows) > 1 and left:
            groups, unshared = _grouped(table, rows, left)
            todo += [(group, (*before, field)) for group, field in groups]
            rows = unshared
        places[rows] = (*before, *left)
    return places


def shared_part(table: FieldTable, places: NDArray[np.uint8]) -> float:
    """The part of the fields' text that repeats the beginning of another row, if every beginning is computed once."""
    num_fields, num_rows = table.codes.shape
    total = int(table.lengths.sum())
    group = np.zeros(num_rows, np.int64)
    computed = 0
    for at in range(num_fields):
        field = places[:, at].astype(np.int64)
        code = table.codes[field, np.arange(num_rows)]
        keys = np.stack([group, field, code])
        _, first, group = np.unique(keys, axis=1, return_index=True, return_inverse=True)
        group = np.asarray(group).reshape(-1)
        computed += int(table.lengths[field[first], first].sum())
    return 1 - computed / total if total else 0.0


def _grouped(table: FieldTable, rows: Codes, fields: Sequence[int]) -> tuple[list[tuple[Codes, int]], Codes]:
    """Rows that have a value in common, with its field, where the value that saves most chooses first; and the rest."""
    is_left = np.ones(len(rows), np.bool_)
    members: list[Codes] = []  # places in `rows`
    heap: list[tuple[int, int, int]] = []
    for field in fields:
        codes = table.codes[field, rows]
        by_code = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.diff(codes[by_code], prepend=-1))
        ends = np.append(starts[1:], len(rows))
        for start, end in zip(starts[ends - starts > 1].tolist(), ends[ends - starts > 1].tolist(), strict=True):
            group = by_code[start:end]
            heap.append((-_gain(table, field, rows[group]), field, len(members)))
            members.append(group)
    heapq.heapify(heap)
    groups = []
    while heap:
        _, field, number = heapq.heappop(heap)
        present = members[number][is_left[members[number]]]
        if len(present) < 2:
            continue
        if len(present) < len(members[number]):  # some of its rows were taken: it saves less than it did
            members[number] = present
            heapq.heappush(heap, (-_gain(table, field, rows[present]), field, number))
            continue
        is_left[present] = False
        groups.append((rows[present], field))
    return groups, rows[is_left]


def _hash(text: str) -> int:
    """The same in every process, so that ties are decided alike."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True)


def _gain(table: FieldTable, field: int, group: Codes) -> int:
    return int(table.lengths[field, group[0]]) * (len(group) - 1)


def _by_savings(table: FieldTable) -> tuple[int, ...]:
    return tuple(sorted(range(len(table.names)), key=lambda field: (-_saved(table, field), field)))


def _saved(table: FieldTable, field: int) -> int:
    """Characters that all rows together save when this field stands first."""
    _, first = np.unique(table.codes[field], return_index=True)
    return int(table.lengths[field].sum() - table.lengths[field][first].sum())


def best_order(table: FieldTable) -> tuple[tuple[str, ...], float, float]:
    """One order of fields for all rows. Returns: it, and the parts of the text that are shared with it and without."""
    num_fields, num_rows = table.codes.shape

    def shared_in(order: Sequence[int]) -> float:
        return shared_part(table, np.broadcast_to(np.array(order, np.uint8), (num_rows, num_fields)))

    given = tuple(range(num_fields))
    tried = permutations(given) if num_fields <= _MOST_PERMUTED else [given, _by_savings(table)]
    best = max(tried, key=shared_in)
    return tuple(table.names[field] for field in best), shared_in(best), shared_in(given)


class ReorderedFields:
    """The order of fields of a table, found when the first row is asked for: a job that goes on needs none."""

    def __init__(self, source: TableSource, names: Sequence[str]) -> None:
        self.found: FieldOrders | None = None
        self._source, self._names = source, names

    def __call__(self, row: int) -> Sequence[str]:
        if self.found is None:
            self.found = order_fields(read_fields(self._source, self._names))
        return self.found(row)

    def __str__(self) -> str:
        """What was gained, as a sentence; empty where no order was needed."""
        if self.found is None:
            return ""
        return (
            f"The order of fields lets {self.found.shared:.0%} of their text be shared with other rows, and the order "
            f"of the table {self.found.shared_before:.0%}."
        )

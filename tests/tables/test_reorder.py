"""The order of fields: what it saves, held against counting prefixes by hand and against trying all orders."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_fakes import TableEngine, TextEngine, run_map, write_parquet

from blendserve.errors import ConfigError
from blendserve.tables.recipe import Recipe
from blendserve.tables.reorder import FieldTable, _grouped, order_fields, read_fields, shared_part
from blendserve.tables.source import MemoryTable

LISTING = Recipe(prompt="Look: {{ row_fields }} Well?", params={"max_tokens": 900})


@st.composite
def field_tables(draw: st.DrawFn) -> FieldTable:
    num_fields, num_rows = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    rows = st.lists(st.integers(0, 3), min_size=num_rows, max_size=num_rows)
    codes = draw(st.lists(rows, min_size=num_fields, max_size=num_fields))
    of_codes = st.lists(st.integers(1, 50), min_size=4, max_size=4)
    length_of_code = draw(st.lists(of_codes, min_size=num_fields, max_size=num_fields))
    lengths = [[length_of_code[field][code] for code in row] for field, row in enumerate(codes)]
    return FieldTable(tuple("abcd"[:num_fields]), np.array(codes), np.array(lengths))


def counted_by_hand(table: FieldTable, places: Any) -> float:
    """Every distinct beginning of a row is computed once."""
    beginnings: dict[tuple[Any, ...], int] = {}
    for row in range(table.num_rows):
        path: tuple[Any, ...] = ()
        for field in map(int, places[row]):
            path = (*path, (field, int(table.codes[field, row])))
            beginnings[path] = int(table.lengths[field, row])
    return 1 - sum(beginnings.values()) / int(table.lengths.sum())


@given(field_tables())
def test_an_order_is_of_all_fields_and_never_worse_than_one_for_all_rows(table: FieldTable) -> None:
    orders = order_fields(table)
    num_fields = len(table.names)
    assert (np.sort(orders.places, axis=1) == np.arange(num_fields)).all()
    assert orders.shared == pytest.approx(counted_by_hand(table, orders.places))
    assert orders.shared >= orders.shared_before - 1e-12
    same = np.tile(np.arange(num_fields, dtype=np.uint8), (table.num_rows, 1))
    assert (
        orders.shared_before == pytest.approx(shared_part(table, same)) == pytest.approx(counted_by_hand(table, same))
    )


def test_groups_choose_orders_of_their_own() -> None:
    """Of the first ten rows the fields a repeat, of the others the fields b: no order for all rows shares both."""
    rows = [{"a": "x" * 40 if row < 10 else str(row), "b": "y" * 40 if row >= 10 else str(row)} for row in range(20)]
    table = read_fields(MemoryTable(rows), ["a", "b"])
    orders = order_fields(table)
    fixed = (np.tile(np.array(order, np.uint8), (20, 1)) for order in permutations(range(2)))
    best_fixed = max(shared_part(table, places) for places in fixed)
    assert orders.shared > 1.5 * best_fixed
    assert [list(orders(row)) for row in (0, 19)] == [["a", "b"], ["b", "a"]]


def test_prompts_list_the_fields_in_that_order_and_lose_none(tmp_path: Path) -> None:
    table = pa.table({"key": [f"k{row}" for row in range(6)], "city": ["Rome"] * 6, "note": ["n", None] * 3})
    source = write_parquet(tmp_path / "in.parquet", table)
    prompts = {}
    for reorders in (False, True):
        output = tmp_path / f"{reorders}.parquet"
        report = run_map(source, output, LISTING, TableEngine(TextEngine(str)), reorders_fields=reorders)
        prompts[reorders] = pq.read_table(output)["answer"].to_pylist()
    assert prompts[False][1] == 'user:Look: {"key": "k1",\n"city": "Rome",\n"note": null} Well?\n'
    assert prompts[True][1] == 'user:Look: {"city": "Rome",\n"note": null,\n"key": "k1"} Well?\n'
    assert report.notes[0].startswith("The order of fields lets 5")


def test_an_order_is_found_again_after_a_crash_and_settings_tell_it_apart(tmp_path: Path) -> None:
    table = pa.table({"key": ["1", "2"], "city": ["Rome", "Rome"]})
    source = write_parquet(tmp_path / "in.parquet", table)
    run_map(source, tmp_path / "out.parquet", LISTING, reorders_fields=True)
    assert run_map(source, tmp_path / "out.parquet", LISTING, reorders_fields=True).was_complete
    with pytest.raises(ConfigError, match="--reorder-fields was True, is None"):
        run_map(source, tmp_path / "out.parquet", LISTING)


@pytest.mark.parametrize("recipe", [Recipe(prompt="{{ key }}"), Recipe(prompt="{{ row_fields }}", fields=("key",))])
def test_without_a_list_of_fields_there_is_nothing_to_order(tmp_path: Path, recipe: Recipe) -> None:
    source = write_parquet(tmp_path / "in.parquet", pa.table({"key": ["1"], "city": ["Rome"]}))
    with pytest.raises(ConfigError, match=r"--reorder-fields orders what \{\{ row_fields \}\} lists"):
        run_map(source, tmp_path / "out.parquet", recipe, reorders_fields=True)


@given(field_tables())
def test_every_row_is_in_one_group_or_in_none(table: FieldTable) -> None:
    groups, rest = _grouped(table, np.arange(table.num_rows), range(len(table.names)))
    members = [row for group, _ in groups for row in group.tolist()]
    assert sorted([*members, *rest.tolist()]) == list(range(table.num_rows))
    assert all(len(set(table.codes[field, group].tolist())) == 1 for group, field in groups)

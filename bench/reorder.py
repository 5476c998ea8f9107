"""Prompt tokens that a table costs under three orders of its fields: `python bench/reorder.py`, 10,000 rows by default.

The table has a review of its own in each row, and three repeated texts: a product, a seller and a policy of returns.
Planned figures count every distinct beginning once, which is what a run computes when the KV memory is large enough;
they take no model time. `--measure N` also answers N of the rows, one token each, on the native engine.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import pyarrow as pa
from common import print_header
from common import table as text_table

from blendserve import NativeSettings, map
from blendserve.dialect.codec import ModelCodec
from blendserve.dialect.schema import ServedModel
from blendserve.engines.opening import open_engine
from blendserve.host import cache_dir
from blendserve.job.batch_input import read_lines
from blendserve.job.job import JobProgress
from blendserve.models.hub import resolve
from blendserve.models.load import load_model
from blendserve.tables.door import FieldOrder, RowLines
from blendserve.tables.recipe import Recipe, RowRequests
from blendserve.tables.reorder import FieldTable, best_order, order_fields, read_fields
from blendserve.tables.source import MemoryTable

_TEXT = (
    "a good bad small large red blue thing that came late early broken and works well for my kitchen garden office it "
    "was easy hard to use the box arrived on time with all parts but one screw never again would buy recommend price"
)
WORDS = _TEXT.split()
NUM_PRODUCTS, NUM_SELLERS, NUM_POLICIES = 150, 60, 8
PROMPT = "Does the review fit the product? Answer yes or no.\n{{ row_fields }}"


def make_table(num_rows: int, seed: int = 0) -> pa.Table:
    """Reviews of about 40 words; products of 60, sellers of 40 and policies of 80, which repeat."""
    source = random.Random(seed)

    def text(num_words: int) -> str:
        return " ".join(source.choice(WORDS) for _ in range(num_words))

    products = [text(60) for _ in range(NUM_PRODUCTS)]
    sellers = [text(40) for _ in range(NUM_SELLERS)]
    policies = [text(80) for _ in range(NUM_POLICIES)]
    by_seller = [source.randrange(NUM_POLICIES) for _ in sellers]
    chosen = [source.randrange(NUM_SELLERS) for _ in range(num_rows)]
    return pa.table(
        {
            "review": [text(source.randint(25, 55)) for _ in range(num_rows)],
            "product": [source.choice(products) for _ in range(num_rows)],
            "seller": [sellers[seller] for seller in chosen],
            "policy": [policies[by_seller[seller]] for seller in chosen],
        }
    )


class FixedOrder:
    """One order for all rows."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def __call__(self, _: int) -> tuple[str, ...]:
        return self._names


def planned_tokens(source: MemoryTable, order: FieldOrder, codec: ModelCodec, served: ServedModel) -> tuple[int, int]:
    """Prompt tokens in all, and those that have to be computed."""
    lines = RowLines(source, RowRequests(Recipe(prompt=PROMPT), source.schema.names), served, order)
    with read_lines(lines, codec, served.max_model_len) as (pending, refused):
        assert not refused
        tree = pending.prefix_tree()
        return tree.num_prompt_tokens, tree.num_unique_tokens


def orders_of(table: FieldTable) -> dict[str, FieldOrder]:
    best, _, _ = best_order(table)
    return {
        "as in the table": FixedOrder(table.names),
        f"best for all rows ({', '.join(best)})": FixedOrder(best),
        "--reorder-fields": order_fields(table),
    }


def measure(table: pa.Table, num_rows: int) -> None:
    """Answer a part of the rows with one token each, in the order of the table and reordered."""
    part = table.slice(0, num_rows)
    rows = []
    for reorders in (False, True):
        seen: list[tuple[int, int]] = []

        def note(progress: JobProgress, seen: list[tuple[int, int]] = seen) -> None:
            seen.append((progress.num_prompt_tokens, progress.num_cached_tokens))

        with tempfile.TemporaryDirectory() as directory:
            engine = open_engine(NativeSettings(dtype="int8"))
            map(
                part,
                prompt=PROMPT,
                params={"max_tokens": 1, "temperature": 0},
                reorder_fields=reorders,
                engine=engine,
                journal=Path(directory),
                on_progress=note,
            )
            prompt, cached = seen[-1]
            rows.append(
                [
                    "--reorder-fields" if reorders else "as in the table",
                    f"{prompt:,}",
                    f"{prompt - cached:,}",
                    f"{cached / prompt:.1%}",
                    f"{engine.times.run_s:.1f}",
                ]
            )
            engine.close()
    print(f"\nmeasured on the native engine, int8, {num_rows} rows, one token each")
    print(text_table(["order of fields", "prompt tokens", "computed", "prefix hits", "run s"], rows))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--measure", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    print_header()
    table = make_table(arguments.rows)
    source = MemoryTable(table)
    model = load_model(resolve(None, cache_dir()))
    codec = ModelCodec(model.tokenizer)
    served = ServedModel((model.spec.name,), vocab_size=model.spec.vocab_size, max_model_len=model.spec.max_position)
    rows, first = [], 0
    for name, order in orders_of(read_fields(source, source.schema.names)).items():
        total, computed = planned_tokens(source, order, codec, served)
        first = first or computed
        rows.append([name, f"{total:,}", f"{computed:,}", f"{1 - computed / total:.1%}", f"{first / computed:.2f}x"])
    print(f"planned, {arguments.rows:,} rows")
    print(text_table(["order of fields", "prompt tokens", "to compute", "shared", "fewer by"], rows))
    if arguments.measure:
        measure(table, arguments.measure)


if __name__ == "__main__":
    main()

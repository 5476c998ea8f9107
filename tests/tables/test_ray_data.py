"""The recipe for Ray Data that docs/tables.md gives, run as it stands there, beside one plan of the whole table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_files import tiny_directory

ROOT = Path(__file__).parent.parent.parent
CHILD = """
import json, sys
import ray

exec(compile(sys.argv[1], "recipe", "exec"))
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
dataset = ray.data.read_parquet(sys.argv[2])
labelled = dataset.map_batches(Labels, batch_format="pyarrow", batch_size=8, concurrency=1)
rows = sorted(labelled.take_all(), key=lambda row: row["id"])
print("ROWS", json.dumps([[row["id"], row["answer"], row["prompt_tokens"]] for row in rows]))
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.thorough
def test_batches_of_ray_data_get_the_answers_of_one_plan(tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'ray>=2.50'")
    page = (ROOT / "docs" / "tables.md").read_text()
    (recipe,) = re.findall(r"```python\n(.*?)```", page[page.index("## Inside Ray Data") :], re.DOTALL)
    tiny = tiny_directory(tmp_path / "tiny")
    settings = f"NativeSettings({str(tiny)!r}, kv_memory_bytes=4 << 20, max_num_seqs=8, num_threads=1)"
    recipe = recipe.replace("NativeSettings()", settings)
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": range(20), "text": [f"it was {row % 3} times good" for row in range(20)]}), source)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "RAY_USAGE_STATS_ENABLED": "0"}
    child = [sys.executable, "-c", CHILD, recipe, str(source)]
    done = subprocess.run(child, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(re.findall(r"^ROWS (.*)$", done.stdout, re.MULTILINE)[0])

    names: dict[str, object] = {}
    exec(recipe, names)
    labels = names["Labels"]()  # type: ignore[operator]
    whole = labels(pq.read_table(source))
    labels.engine.close()
    assert found == [[row["id"], row["answer"], row["prompt_tokens"]] for row in whole.to_pylist()], (
        "the order of a batch never changes answers"
    )

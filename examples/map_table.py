"""Answer every row of a table on this machine's CPU: python examples/map_table.py IN OUT [MODEL].

IN has a column `country`, as examples/countries.jsonl does. OUT ends in .parquet, .jsonl, .csv or .arrow.
"""

import json
import sys
from pathlib import Path

from blendserve import NativeSettings, map_file

HERE = Path(__file__).parent
source, output, *model = sys.argv[1:]
report = map_file(
    source,
    output,
    prompt="Country: {{ country }}",
    examples=[json.loads(line) for line in (HERE / "countries-answered.jsonl").read_text().splitlines()],
    schema=json.loads((HERE / "country.schema.json").read_text()),
    unnest=True,
    params={"max_tokens": 40, "temperature": 0},
    engine=NativeSettings(model=model[0] if model else None, kv_memory_bytes=256 << 20),
)
print(f"{report.num_succeeded} answers, {report.num_failed} rows with errors, {report.num_output_tokens} tokens out")

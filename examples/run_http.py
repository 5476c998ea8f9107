"""Answer a batch file by a server that runs already: python examples/run_http.py IN.jsonl OUT.jsonl URL.

The key comes from BLENDSERVE_API_KEY, else OPENAI_API_KEY.
"""

import sys

from blendserve import HttpSettings, run_batch

source, output, base_url = sys.argv[1:]
report = run_batch(source, output, engine=HttpSettings(base_url, max_inflight=32, max_outage_s=120))
print(f"{report.num_succeeded} answers, {report.num_failed} errors")
print(*report.notes, sep="\n")

"""Answer a batch file with vLLM in this process: python examples/run_vllm.py IN.jsonl OUT.jsonl MODEL.

Limits that are not given stay vLLM's own. `arguments` are any other fields of vLLM's EngineArgs.
"""

import sys

from blendserve import VllmSettings, run_batch

source, output, model = sys.argv[1:]
settings = VllmSettings(model, own_process=True, arguments={"gpu_memory_utilization": 0.9})
report = run_batch(source, output, engine=settings)
print(f"{report.num_succeeded} answers, {report.num_failed} errors")
print(*report.notes, sep="\n")

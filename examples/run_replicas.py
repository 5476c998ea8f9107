"""Answer a batch file on two copies of the CPU engine, started with Ray on this machine:
python examples/run_replicas.py IN.jsonl OUT.jsonl [MODEL].

On a cluster give `ray_address="auto"`; for vLLM give `engine=VllmSettings(...)` and `num_gpus` of each replica.
"""

import sys

from blendserve import NativeSettings, ReplicaSettings, run_batch

source, output, *model = sys.argv[1:]
engine = NativeSettings(model=model[0] if model else None, kv_memory_bytes=64 << 20, num_threads=1)
report = run_batch(source, output, engine=ReplicaSettings(num_replicas=2, num_cpus=0.5, engine=engine))
print(f"{report.num_succeeded} answers, {report.num_failed} errors")
print(*report.notes, sep="\n")

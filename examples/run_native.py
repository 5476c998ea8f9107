"""Answer a batch file on this machine's CPU: python examples/run_native.py IN.jsonl OUT.jsonl [MODEL]."""

import sys

from blendserve import JobProgress, NativeSettings, run_batch


def show(progress: JobProgress) -> None:
    print(f"\r{progress.num_done} of {progress.num_requests} requests", end="", file=sys.stderr)


source, output, *model = sys.argv[1:]
settings = NativeSettings(model=model[0] if model else None, kv_memory_bytes=256 << 20)
report = run_batch(source, output, engine=settings, ordered=True, on_progress=show)
print(f"\n{report.num_succeeded} answers, {report.num_failed} errors, {report.num_output_tokens} tokens out")

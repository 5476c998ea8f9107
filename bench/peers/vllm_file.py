"""vLLM's `LLM.chat` on a batch file, in the order of the file or sorted by prompt; prints one JSON line at the end.

Usage: vllm_file.py IN.jsonl {file,sorted} ARGUMENTS_AS_JSON
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import vllm


def main() -> None:
    source, order, arguments = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    started_s = time.perf_counter()
    llm = vllm.LLM(**arguments)
    loaded_s = time.perf_counter()
    bodies = [json.loads(line)["body"] for line in source.read_text().splitlines()]
    if order == "sorted":
        bodies.sort(key=lambda body: json.dumps(body["messages"]))
    outputs = llm.chat([body["messages"] for body in bodies], [_params(body) for body in bodies], use_tqdm=False)
    ended_s = time.perf_counter()
    report = {
        "load_s": loaded_s - started_s,
        "run_s": ended_s - loaded_s,
        "num_prompt_tokens": sum(len(output.prompt_token_ids or ()) for output in outputs),
        "num_cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        "num_output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
        "num_succeeded": len(outputs),
    }
    print(json.dumps(report))


def _params(body: dict[str, Any]) -> vllm.SamplingParams:
    return vllm.SamplingParams(
        max_tokens=body["max_tokens"], temperature=body["temperature"], ignore_eos=body["ignore_eos"]
    )


if __name__ == "__main__":
    main()

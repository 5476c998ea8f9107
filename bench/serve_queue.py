"""What one plan over all queued batches is worth: batches that share a long system prompt, answered in four ways.

- queued: `blendserve serve`, all batches in its queue.
- one by one: `blendserve serve`, each batch sent when the one before it has ended, as a queue would.
- merged: `blendserve run` on one file with all their lines. It says how many prompt tokens have to be computed.
- vLLM: its own server, asked line by line in the order of the files, --inflight requests at a time.

Times are of the answers alone, without start and loading. `scripts/setup-peers vllm` makes vLLM's environment.

    python bench/serve_queue.py
    python bench/serve_queue.py --batches 10 --lines 16 --ways queued,one-by-one,merged
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import common
import httpx2
from serve_load import CHAT, in_progress, service, store_file
from server_process import server
from vllm_ways import PEERS, WORDS

from blendserve.serve.store import SqliteStore

WAYS = ("queued", "one-by-one", "merged", "vllm")
NAME = "shared"


class Outcome(NamedTuple):
    """One way. `num_computed` are prompt tokens that no cache had."""

    elapsed_s: float
    num_prompt_tokens: int
    num_computed: int
    num_output_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--lines", type=int, default=16, help="lines of each batch")
    parser.add_argument("--shared-words", type=int, default=400, help="length of the system prompt")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--ways", default=",".join(WAYS), help="of " + ", ".join(WAYS))
    parser.add_argument("--inflight", type=int, default=32, help="requests that vLLM has at a time")
    parser.add_argument("--model", default=str(PEERS / "weights/SmolLM2-135M-Instruct-hf"))
    arguments = parser.parse_args()
    common.print_header()
    files = list(some_batches(arguments))
    ways = {"queued": queued, "one-by-one": one_by_one, "merged": merged, "vllm": vllm}
    with tempfile.TemporaryDirectory() as name:
        found = {}
        for way in arguments.ways.split(","):
            directory = Path(name) / way
            directory.mkdir()
            found[way] = ways[way](files, directory, arguments)
            print(f"  {way}: {found[way].elapsed_s:.1f} s", flush=True)
    first = next(iter(found.values()))
    rows = [
        [
            way,
            f"{one.elapsed_s:.1f}",
            f"{one.elapsed_s / first.elapsed_s:.2f}x",
            f"{one.num_prompt_tokens} + {one.num_output_tokens}",
            str(one.num_computed),
        ]
        for way, one in found.items()
    ]
    print(common.table(["way", "seconds", "relative", "tokens in + out", "prompt tokens computed"], rows))


def some_batches(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    chance = random.Random(7)
    system = " ".join(chance.choice(WORDS) for _ in range(arguments.shared_words))
    for number in range(arguments.batches):
        rows = []
        for line in range(arguments.lines):
            asked = " ".join(chance.choice(WORDS) for _ in range(12))
            messages = [{"role": "system", "content": system}, {"role": "user", "content": f"{asked}?"}]
            body = {"model": NAME, "messages": messages, "max_tokens": arguments.max_tokens, "temperature": 0}
            row = {"custom_id": f"{number}-{line}", "method": "POST", "url": CHAT, "body": {**body, "ignore_eos": True}}
            rows.append(row)
        yield rows


def _bytes(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def queued(files: list[list[dict[str, Any]]], directory: Path, arguments: argparse.Namespace) -> Outcome:
    """All batches stand in the queue when the service starts. Its round is timed from the loaded model."""
    data = directory / "data"
    (data / "files").mkdir(parents=True)
    store = SqliteStore(data / "service.db")
    due = int(time.time()) + 86400
    batches = [in_progress(store_file(store, data, _bytes(rows)), NAME, due) for rows in files]
    store.put(*batches)
    store.close()
    with service(data, ["--model", f"{NAME}={arguments.model}"]) as url:
        started = time.perf_counter()
        for batch in batches:
            wait_for_end(url, batch.id)
        return outcome_of(url, time.perf_counter() - started)


def one_by_one(files: list[list[dict[str, Any]]], directory: Path, arguments: argparse.Namespace) -> Outcome:
    with service(directory / "data", ["--model", f"{NAME}={arguments.model}"]) as url:
        started = time.perf_counter()
        for rows in files:
            form = {"file": ("in.jsonl", _bytes(rows))}
            file = httpx2.post(f"{url}/v1/files", files=form, data={"purpose": "batch"}).json()
            body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
            wait_for_end(url, httpx2.post(f"{url}/v1/batches", json=body).json()["id"])
        return outcome_of(url, time.perf_counter() - started)


def merged(files: list[list[dict[str, Any]]], directory: Path, arguments: argparse.Namespace) -> Outcome:
    source = directory / "in.jsonl"
    source.write_bytes(b"".join(map(_bytes, files)))
    command = [sys.executable, "-m", "blendserve", "run", str(source), "-o", str(directory / "out.jsonl"), "--json"]
    done = subprocess.run([*command, "--model", arguments.model], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    num_prompt = report["num_prompt_tokens"]
    return Outcome(report["run_s"], num_prompt, num_prompt - report["num_cached_tokens"], report["num_output_tokens"])


def vllm(files: list[list[dict[str, Any]]], directory: Path, arguments: argparse.Namespace) -> Outcome:
    with vllm_server(directory, arguments) as url, ThreadPoolExecutor(arguments.inflight) as pool:
        post = httpx2.Client(base_url=url, timeout=600)
        warm_up = {**files[0][0]["body"], "messages": [{"role": "user", "content": "hello"}]}
        post.post(CHAT, json=warm_up).raise_for_status()
        started = time.perf_counter()
        bodies = [row["body"] for rows in files for row in rows]
        usages = [reply.json()["usage"] for reply in pool.map(lambda body: post.post(CHAT, json=body), bodies)]
        elapsed_s = time.perf_counter() - started
    num_prompt = sum(usage["prompt_tokens"] for usage in usages)
    num_cached = sum((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for usage in usages)
    num_output = sum(usage["completion_tokens"] for usage in usages)
    return Outcome(elapsed_s, num_prompt, num_prompt - num_cached, num_output)


@contextmanager
def vllm_server(directory: Path, arguments: argparse.Namespace) -> Iterator[str]:
    port = 18431
    options = ["--served-model-name", NAME, "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "2048"]
    options += ["--enforce-eager", "--enable-prefix-caching", "--enable-prompt-tokens-details", "--block-size", "32"]
    options += ["--max-num-batched-tokens", "512", "--max-num-seqs", str(arguments.inflight)]
    options += ["--kv-cache-memory-bytes", str(1 << 30)]
    threads = str(len(os.sched_getaffinity(0)))
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads, "VLLM_NO_USAGE_STATS": "1"}
    entry = "vllm.entrypoints.launchers.api_server.entry"  # what `vllm serve` calls
    command = [str(PEERS / "vllm/bin/python"), "-m", entry, "--model", arguments.model, *options]
    url = f"http://127.0.0.1:{port}"
    with server(command, f"{url}/health", directory / "vllm.log", environment):
        yield url


def wait_for_end(url: str, id: str) -> None:
    while (status := httpx2.get(f"{url}/v1/batches/{id}").json()["status"]) != "completed":
        if status in ("failed", "expired", "cancelled"):
            raise SystemExit(f"batch {id} is {status}")
        time.sleep(0.05)


def outcome_of(url: str, elapsed_s: float) -> Outcome:
    text = httpx2.get(f"{url}/metrics").text

    def count(kind: str) -> int:
        found = re.search(rf'^blendserve_tokens_total{{kind="{kind}"}} (\S+)', text, re.MULTILINE)
        assert found is not None, text
        return int(float(found[1]))

    return Outcome(elapsed_s, count("prompt"), count("prompt") - count("cached"), count("output"))


if __name__ == "__main__":
    main()

"""What the service's API costs while its engine works: clients that poll, and the engine's own pace beside them.

Starts `blendserve serve` on the native engine with the default model, stores many batches that have ended, runs a
batch, and lets many clients ask for their batches meanwhile. The same lines are run by `blendserve run` before and
after, so that both are measured on the same machine in the same minutes.

    python bench/serve_load.py
    python bench/serve_load.py --clients 200 --batches 1000 --lines 60 --model ./my-model
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import httpx2

from blendserve.serve.records import BatchRecord, new_id
from blendserve.serve.store import SqliteStore

CHAT = "/v1/chat/completions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--batches", type=int, default=1000, help="batches to poll")
    parser.add_argument("--lines", type=int, default=60, help="lines of the batch that runs")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two requests of a client")
    parser.add_argument("--model", help="model of the engine")
    arguments = parser.parse_args()
    common.print_header()
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), arguments)


def measure(directory: Path, arguments: argparse.Namespace) -> None:
    source = directory / "in.jsonl"
    source.write_bytes(some_lines(arguments.lines, arguments.model or "SmolLM2-135M-Instruct"))
    options = ["--model", arguments.model] if arguments.model else []
    alone = [run_alone(source, directory / "before.jsonl", options)]
    print(f"{'blendserve run, before':<40}{alone[0]:.1f} s", flush=True)
    ids = store_ended(directory / "data", arguments.batches)
    with service(directory / "data", options) as url:
        quiet = asyncio.run(served(url, source, [], arguments))
        busy = asyncio.run(served(url, source, ids, arguments))
    alone.append(run_alone(source, directory / "after.jsonl", options))
    latencies = sorted(busy[1])
    rows = [
        ("blendserve run, after", f"{alone[1]:.1f} s"),
        ("served, nobody asks", f"{quiet[0]:.1f} s"),
        (f"served, {arguments.clients} clients ask", f"{busy[0]:.1f} s"),
        ("requests answered meanwhile", f"{len(latencies)}, {len(latencies) / busy[0]:.0f} per second"),
        ("latency median, p99, most", ", ".join(f"{1e3 * value:.1f} ms" for value in quantiles(latencies))),
    ]
    for label, value in rows:
        print(f"{label:<40}{value}")


def quantiles(sorted_values: list[float]) -> tuple[float, float, float]:
    last = len(sorted_values) - 1
    return statistics.median(sorted_values), sorted_values[round(0.99 * last)], sorted_values[last]


def some_lines(count: int, model: str) -> bytes:
    chance = random.Random(1)
    rows = []
    for number in range(count):
        words = " ".join(f"word{chance.randrange(1000)}" for _ in range(chance.randrange(20, 300)))
        body = {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": 64, "temperature": 0}
        rows.append(json.dumps({"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}))
    return "\n".join(rows).encode() + b"\n"


def run_alone(source: Path, output: Path, options: list[str]) -> float:
    """Seconds that the requests took in a run, without the time to load."""
    command = [sys.executable, "-m", "blendserve", "run", str(source), "-o", str(output), "--json", *options]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    times: dict[str, Any] = json.loads(found.stdout)
    return float(times["run_s"])


def store_ended(data: Path, count: int) -> list[str]:
    """Batches that have ended, as an earlier service would have left them."""
    data.mkdir()
    store = SqliteStore(data / "service.db")
    made = [
        BatchRecord(new_id("batch"), "", 1, "file_1", CHAT, "24h", 1 << 40, "", "", status="completed")
        for _ in range(count)
    ]
    store.put(*made)
    store.close()
    return [batch.id for batch in made]


@contextmanager
def service(data: Path, options: list[str]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "blendserve", "serve", "--data", str(data), "--port", str(port), *options]
    with (data.parent / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_ready(url):
            if process.poll() is not None:
                raise SystemExit(f"the service ended: {(data.parent / 'serve.log').read_text()[-1000:]}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health/ready").status_code == 200
    except httpx2.TransportError:
        return False


async def served(url: str, source: Path, ids: list[str], arguments: argparse.Namespace) -> tuple[float, list[float]]:
    """Seconds from the first answer's round to the end of a batch, and latencies of all that was asked meanwhile."""
    latencies: list[float] = []
    is_over = asyncio.Event()
    limits = httpx2.Limits(max_connections=arguments.clients + 5)
    async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        files = {"file": ("in.jsonl", source.read_bytes())}
        file = (await client.post("/v1/files", files=files, data={"purpose": "batch"})).json()
        warm_up = {"model": None, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        await client.post(CHAT, json={name: value for name, value in warm_up.items() if value is not None})
        metadata = {"run": str(time.time())}
        body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h", "metadata": metadata}
        started = time.perf_counter()
        batch = (await client.post("/v1/batches", json=body)).json()

        async def poll(number: int) -> None:
            await asyncio.sleep(arguments.pause * number / arguments.clients)
            while not is_over.is_set():
                asked = time.perf_counter()
                await client.get(f"/v1/batches/{ids[(number * 7919 + len(latencies)) % len(ids)]}")
                latencies.append(time.perf_counter() - asked)
                await asyncio.sleep(arguments.pause)

        pollers = [asyncio.create_task(poll(number)) for number in range(arguments.clients if ids else 0)]
        while (await client.get(f"/v1/batches/{batch['id']}")).json()["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.05)
        seconds = time.perf_counter() - started
        is_over.set()
        await asyncio.gather(*pollers)
    return seconds, latencies


if __name__ == "__main__":
    main()

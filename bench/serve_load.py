"""What the service's API costs its engine: the same lines by `blendserve run` and by a service that many clients ask.

Three run by turns: `blendserve run`, a service that nobody asks, and one that clients ask. Before its turn a service
is given a batch of these lines and many batches that wait for another model; clients then ask for all of them, each
once in --pause seconds, until the batch has ended. Every turn of the service is a new process. Compared are the seconds
in which requests ran, without loading and planning. The clients are one process that does as little as it can, for it
has the same cores.

    python bench/serve_load.py
    python bench/serve_load.py --clients 200 --batches 1000 --lines 40 --pairs 5 --model ./my-model
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import common
import httpx2
from server_process import server

from blendserve.serve.records import BatchRecord, FileRecord, new_id
from blendserve.serve.store import SqliteStore

CHAT = "/v1/chat/completions"
NAME, WAITING = "measured", "waiting"
OWNER_PAUSE_S = 0.5
"""Who made the batch asks for it so often."""


class Turn(NamedTuple):
    """A turn of the service. `service_s` and `client_s`: CPU time of the API's process, and of the clients, which have
    the same cores.
    """

    run_s: float
    latencies: list[float]
    service_s: float
    client_s: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--batches", type=int, default=1000, help="batches that are asked for")
    parser.add_argument("--lines", type=int, default=40, help="lines of the batch that runs")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two requests of a client")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="model of the engine")
    arguments = parser.parse_args()
    common.print_header()
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), arguments)


def measure(directory: Path, arguments: argparse.Namespace) -> None:
    source = directory / "in.jsonl"
    source.write_bytes(some_lines(arguments.lines, NAME))
    alone, unasked, turns = [], [], []
    for number in range(arguments.pairs):
        alone.append(run_alone(source, directory / f"{number}.jsonl", arguments.model))
        unasked.append(run_served(source, directory / f"unasked{number}", arguments, num_clients=0))
        turns.append(run_served(source, directory / f"data{number}", arguments, num_clients=arguments.clients))
        found = alone[-1], unasked[-1].run_s, turns[-1].run_s
        print("turn {}: run {:.2f} s, unasked {:.2f} s, asked {:.2f} s".format(number + 1, *found), flush=True)
    report(alone, unasked, turns)


def report(alone: list[float], unasked: list[Turn], turns: list[Turn]) -> None:
    def over_run(served: list[Turn]) -> str:
        return common.summarise([turn.run_s / one for turn, one in zip(served, alone, strict=True)]).text(3)

    latencies = sorted(latency for turn in turns for latency in turn.latencies)
    seconds = sum(turn.seconds for turn in turns)
    places = [latencies[round(share * (len(latencies) - 1))] for share in (0.5, 0.99, 1.0)]
    rows = [
        ("blendserve run", f"{common.summarise(alone).text(2)} s"),
        ("served, nobody asks", f"{common.summarise([turn.run_s for turn in unasked]).text(2)} s"),
        ("served, clients ask", f"{common.summarise([turn.run_s for turn in turns]).text(2)} s"),
        ("nobody asks over run, by turns", over_run(unasked)),
        ("clients ask over run, by turns", over_run(turns)),
        ("requests answered meanwhile", f"{len(latencies)}, {len(latencies) / seconds:.0f} per second"),
        ("latency median, p99, longest", ", ".join(f"{1e3 * value:.1f} ms" for value in places)),
        ("CPU of the API, nobody asks", of_a_core([turn.service_s for turn in unasked], unasked)),
        ("CPU of the API, clients ask", of_a_core([turn.service_s for turn in turns], turns)),
        ("CPU of the clients", of_a_core([turn.client_s for turn in turns], turns)),
    ]
    for label, value in rows:
        print(f"{label:<36}{value}")


def of_a_core(cpu_s: list[float], turns: list[Turn]) -> str:
    return f"{100 * sum(cpu_s) / sum(turn.seconds for turn in turns):.1f}% of a core"


def some_lines(count: int, model: str) -> bytes:
    chance = random.Random(1)
    rows = []
    for number in range(count):
        words = " ".join(f"word{chance.randrange(1000)}" for _ in range(chance.randrange(20, 120)))
        body = {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": 64, "temperature": 0}
        rows.append(json.dumps({"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}))
    return "\n".join(rows).encode() + b"\n"


def run_alone(source: Path, output: Path, model: str) -> float:
    command = [sys.executable, "-m", "blendserve", "run", str(source), "-o", str(output), "--json", "--model", model]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    times: dict[str, Any] = json.loads(found.stdout)
    return float(times["run_s"])


def run_served(source: Path, data: Path, arguments: argparse.Namespace, *, num_clients: int) -> Turn:
    """One turn of a new service."""
    id, others = store_batches(data, source, arguments.batches)
    options = [word for name in (NAME, WAITING) for word in ("--model", f"{name}={arguments.model}")]
    with service(data, options) as url:
        pid = int((data / "service.lock").read_text())
        started, used, before_s = time.perf_counter(), time.process_time(), cpu_seconds(pid)
        latencies = ask_until_ended(url, id, others, num_clients, arguments.pause)
        seconds, client_s = time.perf_counter() - started, time.process_time() - used
        service_s = cpu_seconds(pid) - before_s
        metrics = httpx2.get(f"{url}/metrics").text
    found = re.search(r"^blendserve_engine_seconds_total (\S+)", metrics, re.MULTILINE)
    assert found is not None, metrics
    return Turn(float(found[1]), latencies, service_s, client_s, seconds)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def store_batches(data: Path, source: Path, count: int) -> tuple[str, list[str]]:
    """What an earlier service would have left: the batch to run, and others that come after it."""
    (data / "files").mkdir(parents=True)
    store = SqliteStore(data / "service.db")
    measured = store_file(store, data, source.read_bytes())
    waiting = store_file(store, data, some_lines(1, WAITING))
    now = int(time.time())
    first = in_progress(measured, NAME, now + 1)
    others = [in_progress(waiting, WAITING, now + 7 * 86400) for _ in range(count)]
    store.put(first, *others)
    store.close()
    return first.id, [batch.id for batch in others]


def in_progress(file: FileRecord, model: str, expires_at: int) -> BatchRecord:
    ids = new_id("batch"), new_id("file"), new_id("file")
    now = int(time.time())
    batch = BatchRecord(ids[0], "", now, file.id, CHAT, "7d", expires_at + 86400, ids[1], ids[2], model=model)
    return batch.moved("in_progress", now, num_lines=file.num_lines)


def store_file(store: SqliteStore, data: Path, content: bytes) -> FileRecord:
    name, digest = new_id("file"), hashlib.sha256(content).hexdigest()
    file = FileRecord(name, "", int(time.time()), "in.jsonl", "batch", len(content), content.count(b"\n"), digest)
    (data / "files" / file.id).write_bytes(content)
    store.put(file)
    return file


@contextmanager
def service(data: Path, options: list[str]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "blendserve", "serve", "--data", str(data), "--port", str(port), *options]
    url = f"http://127.0.0.1:{port}"
    with server(command, f"{url}/health/ready", data.parent / "serve.log"):
        yield url


def ask_until_ended(url: str, id: str, others: list[str], num_clients: int, pause_s: float) -> list[float]:
    """Clients with a connection each ask until the batch has ended, one after the other within the pause. Returns: how
    long each request took.
    """
    port = int(url.rpartition(":")[2])
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(num_clients)]
    selector, sent_at, latencies = selectors.DefaultSelector(), dict[socket.socket, float](), list[float]()
    for client in clients:
        selector.register(client, selectors.EVENT_READ)
    with socket.create_connection(("127.0.0.1", port)) as owner:
        owner.settimeout(60)
        started = time.perf_counter()
        asked_at, number = started, 0
        while True:
            now = time.perf_counter()
            if now >= asked_at:
                asked_at = now + OWNER_PAUSE_S
                owner.sendall(request_of(id))
                if b'"status": "completed"' in owner.recv(65536):
                    break
            due = started + number * pause_s / num_clients if clients else asked_at
            if clients and now >= due:
                client = clients[number % num_clients]
                if client not in sent_at:  # else it still waits
                    sent_at[client] = now
                    client.sendall(request_of(others[number % len(others)]))
                number += 1
            for key, _ in selector.select(max(0.0, min(due, asked_at) - time.perf_counter())):
                client = key.fileobj  # type: ignore[assignment]
                answer = client.recv(65536)
                assert answer.startswith(b"HTTP/1.1 200 "), answer
                latencies.append(time.perf_counter() - sent_at.pop(client))
    for client in clients:
        client.close()
    return latencies


def request_of(id: str) -> bytes:
    return f"GET /v1/batches/{id} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\n\r\n".encode()


if __name__ == "__main__":
    main()

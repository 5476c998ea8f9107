"""Batch jobs against the fake server: a clock that does not wait, and the checks that every job must pass."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch_fakes import read_rows

from blendserve.dialect.schema import ServedModel
from blendserve.engine.planned import plan_requests
from blendserve.engines.estimates import EstimatingCodec, remote_cost, remote_table
from blendserve.engines.http.address import ServerAddress
from blendserve.engines.http.credentials import Credentials
from blendserve.engines.http.dispatch import HttpDispatcher, HttpLimits
from blendserve.engines.http.fake_server import FakeServer
from blendserve.engines.http.pacing import RetrySettings
from blendserve.job.job import BatchJob, JobReport
from blendserve.job.pending import PendingRequests
from blendserve.job.run import run_job
from blendserve.planner.policies import make_policy

KEY = "sk-very-secret-0123456789"
SERVED = ServedModel(("remote",), accepts_any_name=True, is_remote=True)


@dataclass
class FakeClock:
    """Time that moves only when everybody sleeps: to the moment at which the first sleeper wakes."""

    now_s: float = 1000.0
    slept_s: list[float] = field(default_factory=list)
    _sleepers: list[tuple[float, int]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def monotonic(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        entry = (self.now_s + seconds, next(self._numbers))
        heapq.heappush(self._sleepers, entry)
        try:
            await asyncio.sleep(0.0005)
            while self._sleepers[0] != entry:
                await asyncio.sleep(0.0005)
            self.now_s = max(self.now_s, entry[0])
        finally:
            self._sleepers.remove(entry)
            heapq.heapify(self._sleepers)


def chat_line(custom_id: str, **body: Any) -> str:
    """A line with parameters that only another server knows."""
    content = {"model": "m", "messages": [{"role": "user", "content": f"what is {custom_id}?"}], **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": content})


def write_input(path: Path, num_lines: int) -> Path:
    path.write_text("\n".join(chat_line(f"id-{number}", max_tokens=1 + number % 9) for number in range(num_lines)))
    return path


def engine_for(server: FakeServer | str, **fields: Any) -> HttpDispatcher:
    """An engine that retries fast, at a fixed seed."""
    base_url = server if isinstance(server, str) else server.base_url
    retry = RetrySettings(**{"max_attempts": 6, "max_outage_s": 600.0, **fields.pop("retry", {})})
    limits = {"max_inflight": 8, "timeout_s": 5.0, **fields.pop("settings", {})}
    return HttpDispatcher(
        ServerAddress.parse(base_url),
        Credentials(KEY),
        HttpLimits(**limits, retry=retry),
        clock=fields.pop("clock", None) or FakeClock(),
        random_source=random.Random(7),
        **fields,
    )


def run_http(
    engine: HttpDispatcher,
    source: Path,
    output: Path,
    *,
    policy: str = "dfs",
    on_progress: Callable[[Any], None] | None = None,
    served: ServedModel = SERVED,
    **fields: Any,
) -> JobReport:
    """Run a job through the engine, from file to files."""

    def generate(pending: PendingRequests) -> Any:
        plan = plan_requests(pending.flat_prompts(), remote_table(pending), remote_cost())
        return engine.run(pending, plan, make_policy(policy, plan))

    job = BatchJob(source, output, served, "remote", {"base_url": engine.address.base_url}, **fields)
    return run_job(job, EstimatingCodec(None), generate, on_progress=on_progress)


def errors_path(output: Path) -> Path:
    return output.with_name(output.name.removesuffix(".jsonl") + ".errors.jsonl")


def errors_of(output: Path) -> list[dict[str, Any]]:
    return read_rows(errors_path(output)) if errors_path(output).exists() else []


def assert_each_line_once(output: Path, num_lines: int) -> None:
    """Nothing lost, nothing twice, over both files."""
    ids = Counter(row["custom_id"] for row in (*read_rows(output), *errors_of(output)))
    assert ids == Counter(f"id-{number}" for number in range(num_lines))


def assert_all_answered(output: Path, num_lines: int) -> None:
    assert_each_line_once(output, num_lines)
    assert errors_of(output) == []


def assert_nowhere(secret: str, directory: Path) -> None:
    """No file below the directory holds the secret."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    assert paths
    for path in paths:
        assert secret.encode() not in path.read_bytes(), path

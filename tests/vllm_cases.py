"""Batch jobs against the fake vLLM, and the checks that every job must pass."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from batch_fakes import FakeCodec, read_rows

from blendserve.dialect.extras import Abilities
from blendserve.dialect.schema import ServedModel
from blendserve.dialect.urls import EMBEDDINGS_URL
from blendserve.engine.planned import plan_requests
from blendserve.engines.estimates import remote_cost
from blendserve.engines.vllm.driver import VllmDriver
from blendserve.engines.vllm.fake import FakeVllm, answer_to
from blendserve.job.job import BatchJob, JobReport
from blendserve.job.pending import PendingRequests
from blendserve.job.run import run_job
from blendserve.planner.policies import make_policy
from blendserve.request import SequenceOutput

ABLE = ServedModel(
    ("tiny",),
    accepts_any_name=True,
    vocab_size=256,
    max_model_len=1024,
    abilities=Abilities(adapters=("pirate", "poet"), sees=True),
)
EMBEDDER = ServedModel(("tiny",), vocab_size=256, max_model_len=1024, abilities=Abilities(urls=(EMBEDDINGS_URL,)))
ADAPTERS = {"pirate": "/adapters/pirate", "poet": "/adapters/poet"}
BY_SCHEDULER = {"scheduler_cls": "blendserve.engines.vllm.scheduler.BlendScheduler"}


def line(custom_id: str, url: str = "/v1/chat/completions", **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def chat(custom_id: str, text: str, **body: Any) -> str:
    return line(custom_id, messages=[{"role": "user", "content": text}], **body)


def mixed_job(path: Path, num_lines: int) -> Path:
    """Chats of three kinds, some of which share a long beginning."""
    lines = []
    for number in range(num_lines):
        shared = "You answer questions about trains. " * 4 if number % 3 else ""
        text = f"{shared}question {number}" + " and so on" * (number % 7)
        lines.append(chat(f"id-{number}", text, max_tokens=1 + 13 * (number % 9)))
    path.write_text("\n".join(lines))
    return path


def vllm_engine(api: FakeVllm, arguments: dict[str, Any] | None = None, **fields: Any) -> VllmDriver:
    """An engine on the fake, with a clock that counts its readings."""
    ticks = iter(range(10**9))
    return VllmDriver(api, arguments or {}, ADAPTERS, clock=lambda: float(next(ticks)), **fields)


class StopError(Exception):
    """What stops a run on purpose."""


def run_vllm(
    engine: VllmDriver,
    source: Path,
    target: Path,
    *,
    policy: str = "blend",
    served: ServedModel = ABLE,
    stop_after: int | None = None,
) -> JobReport:
    """Run a job; `stop_after` so many ends it breaks off. Raises: StopError then."""

    def generate(pending: PendingRequests) -> Iterator[SequenceOutput]:
        plan = plan_requests(pending.flat_prompts(), pending.table(), remote_cost())
        outputs = engine.run(pending, plan, make_policy(policy, plan))
        try:
            for count, output in enumerate(outputs):
                if count == stop_after:
                    raise StopError
                yield output
        finally:
            assert isinstance(outputs, Generator)
            outputs.close()

    settings = {"engine": "vllm"}
    return run_job(BatchJob(source, target, served, "tiny", settings), FakeCodec(), generate, clock=lambda: 1.0)


def check_rows(target: Path, num_lines: int) -> Counter[str]:
    """Every line has one row; returns how many of each kind. Answers are those of the fake."""
    kinds: Counter[str] = Counter()
    ids = []
    for path in (target, target.with_suffix(".errors.jsonl")):
        for row in read_rows(path) if path.exists() else ():
            ids.append(row["custom_id"])
            response = row["response"]
            is_answer = response is not None and response["status_code"] == 200
            kinds["answer" if is_answer else response["body"]["error"]["code"]] += 1
    assert sorted(ids) == sorted(set(ids))
    assert len(ids) == num_lines
    return kinds


def text_of_answer(prompt: bytes, count: int, *, is_stopped: bool) -> str:
    """What `FakeCodec` makes of the fake's tokens."""
    tokens = answer_to(list(prompt), count)
    return bytes(tokens[:-1] if is_stopped else tokens).decode(errors="replace")

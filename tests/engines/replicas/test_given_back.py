"""Every engine ends what was given back as it ends what it cannot serve, and answers the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_fakes import write_lines
from http_cases import engine_for
from parallel_cases import COST
from tiny_files import tiny_directory
from vllm_cases import BY_SCHEDULER, vllm_engine

from blendserve.dialect.schema import ServedModel
from blendserve.engines.estimates import EstimatingCodec
from blendserve.engines.http.fake_server import serving
from blendserve.engines.opening import open_engine
from blendserve.engines.replicas.part import GivenBackError, JobPart, SharedJob
from blendserve.engines.settings import NativeSettings
from blendserve.engines.vllm.fake import FakeVllm
from blendserve.job.ingest import encode_lines
from blendserve.job.pending import PendingRequests, plan_pending
from blendserve.job.reader import BatchReader
from blendserve.job.store import TokenStore
from blendserve.job.store_writer import StoreWriter
from blendserve.planner.policies import make_policy
from blendserve.request import SequenceOutput

NUM_LINES = 40
Generate = Callable[[PendingRequests], Iterator[SequenceOutput]]


@contextmanager
def native(tmp_path: Path) -> Iterator[tuple[ServedModel, Any, Generate]]:
    model = tiny_directory(tmp_path / "tiny")
    settings = NativeSettings(
        str(model), kv_memory_bytes=4 << 20, max_num_seqs=4, max_num_batched_tokens=64, num_threads=1
    )
    engine = open_engine(settings)
    yield engine.served, engine.codec, partial(engine.generate, policy="blend")
    engine.close()


@contextmanager
def http(tmp_path: Path) -> Iterator[tuple[ServedModel, Any, Generate]]:  # noqa: ARG001
    with serving() as server:
        engine = engine_for(server)

        def generate(pending: PendingRequests) -> Iterator[SequenceOutput]:
            plan = plan_pending(pending, pending.table(), COST)
            return engine.run(pending, plan, make_policy("blend", plan))

        yield ServedModel(("m",), accepts_any_name=True, is_remote=True), EstimatingCodec(None), generate


def vllm(arguments: dict[str, Any]) -> Any:
    @contextmanager
    def opened(tmp_path: Path) -> Iterator[tuple[ServedModel, Any, Generate]]:  # noqa: ARG001
        engine = vllm_engine(FakeVllm(), arguments)

        def generate(pending: PendingRequests) -> Iterator[SequenceOutput]:
            plan = plan_pending(pending, pending.table(), COST)
            return engine.run(pending, plan, make_policy("blend", plan))

        yield ServedModel(("m",), accepts_any_name=True, max_model_len=2048), EstimatingCodec(None), generate
        engine.close()

    return opened


@pytest.mark.parametrize(
    "opened",
    [native, http, vllm({}), vllm(BY_SCHEDULER)],
    ids=["native", "http", "vllm, front", "vllm, scheduler"],
)
def test_rows_that_were_given_back_end_unanswered(opened: Any, tmp_path: Path) -> None:
    bodies = [{"model": "m", "prompt": f"number {n}", "max_tokens": 3 + n % 5} for n in range(NUM_LINES)]
    url = "/v1/completions"
    lines = [{"custom_id": str(n), "method": "POST", "url": url, "body": body} for n, body in enumerate(bodies)]
    source = write_lines(tmp_path / "in.jsonl", lines)
    with opened(tmp_path) as (served, codec, generate):
        writer = StoreWriter(tmp_path / "store")
        encode_lines(BatchReader(source, served), codec, served.max_model_len, writer.add, lambda _: None)
        store = TokenStore.open(tmp_path / "store", writer.finish(), served.max_model_len)
        pending = PendingRequests(store, np.arange(NUM_LINES, dtype=np.int64))
        job = SharedJob.of(pending, plan_pending(pending, pending.table(), COST))
        part = JobPart(job, job.store(), np.arange(NUM_LINES, dtype=np.int64))
        outputs = generate(part)
        first = next(outputs)
        given = set(part.give_back(0.5).tolist())
        ended = [first, *outputs]
    assert given
    assert sorted(output.index for output in ended) == list(range(NUM_LINES))
    unanswered = {output.index for output in ended if isinstance(output.error, GivenBackError)}
    assert unanswered == given
    assert all(output.error is None for output in ended if output.index not in given)

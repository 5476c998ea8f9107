"""Every engine ends what was given back, or what nobody wants any more, and answers the rest."""

from __future__ import annotations

import threading
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
from blendserve.engines.http.fake_server import FakeSettings, serving
from blendserve.engines.opening import open_engine
from blendserve.engines.replicas.part import GivenBackError, JobPart, SharedJob
from blendserve.engines.settings import NativeSettings
from blendserve.engines.vllm.fake import FakeVllm
from blendserve.errors import RequestError
from blendserve.job.ingest import encode_lines
from blendserve.job.pending import WITHDRAWN, PendingRequests, plan_pending
from blendserve.job.reader import BatchReader
from blendserve.job.store import TokenStore
from blendserve.job.store_writer import StoreWriter
from blendserve.planner.policies import make_policy
from blendserve.request import SequenceOutput
from blendserve.serve.joined import RoundRequests

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


EVERY_ENGINE = pytest.mark.parametrize(
    "opened",
    [native, http, vllm({}), vllm(BY_SCHEDULER)],
    ids=["native", "http", "vllm, front", "vllm, scheduler"],
)


def stored(tmp_path: Path, served: ServedModel, codec: Any, name: str = "in", **fields: Any) -> PendingRequests:
    """Completions of a few tokens each."""
    bodies = [{"model": "m", "prompt": f"number {n}", "max_tokens": 3 + n % 5, **fields} for n in range(NUM_LINES)]
    url = "/v1/completions"
    lines = [{"custom_id": str(n), "method": "POST", "url": url, "body": body} for n, body in enumerate(bodies)]
    source, directory = write_lines(tmp_path / f"{name}.jsonl", lines), tmp_path / name
    writer = StoreWriter(directory)
    encode_lines(BatchReader(source, served), codec, served.max_model_len, writer.add, lambda _: None)
    store = TokenStore.open(directory, writer.finish(), served.max_model_len)
    return PendingRequests(store, np.arange(NUM_LINES, dtype=np.int64))


@EVERY_ENGINE
def test_rows_that_were_given_back_end_unanswered(opened: Any, tmp_path: Path) -> None:
    with opened(tmp_path) as (served, codec, generate):
        pending = stored(tmp_path, served, codec)
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


@EVERY_ENGINE
def test_a_run_that_begins_no_more_answers_what_it_has_begun(opened: Any, tmp_path: Path) -> None:
    is_yielding: list[bool] = []
    with opened(tmp_path) as (served, codec, generate):
        part = stored(tmp_path, served, codec)
        outputs = generate(RoundRequests([part], lambda _: False, lambda: bool(is_yielding)))
        ended = [next(outputs)]
        is_yielding.append(True)
        ended += outputs
    assert sorted(output.index for output in ended) == list(range(NUM_LINES))
    withdrawn = [output for output in ended if isinstance(output.error, RequestError)]
    assert 0 < len(withdrawn) < NUM_LINES
    assert {output.error.code for output in withdrawn} == {WITHDRAWN}  # type: ignore[union-attr]


@pytest.mark.parametrize("arguments", [{}, BY_SCHEDULER], ids=["front", "scheduler"])
def test_vllm_stops_what_nobody_wants_any_more(tmp_path: Path, arguments: dict[str, Any]) -> None:
    api, dropped = FakeVllm(), set[int]()
    engine = vllm_engine(api, arguments)
    served, codec = ServedModel(("m",), accepts_any_name=True, max_model_len=2048), EstimatingCodec(None)
    parts = [
        stored(tmp_path, served, codec, "long", max_tokens=200, ignore_eos=True),
        stored(tmp_path, served, codec, "short", ignore_eos=True),
    ]
    pending = RoundRequests(parts, dropped.__contains__)
    plan = plan_pending(pending, pending.table(), COST)
    answered = []
    for output in engine.run(pending, plan, make_policy("blend", plan)):
        dropped.add(0)
        if output.error is None:
            answered.append(pending.place_of(output.index))
    assert len(api.engines[0].aborted) > 0
    assert [number for part, number in sorted(answered) if part == 1] == list(range(NUM_LINES))
    assert sum(part == 0 for part, _ in answered) <= 1
    assert api.engines[0].scheduler.num_free == api.num_blocks - 1


def test_a_server_is_not_waited_for_where_nobody_wants_its_answers(tmp_path: Path) -> None:
    dropped = set[int]()
    served, codec = ServedModel(("m",), accepts_any_name=True, is_remote=True), EstimatingCodec(None)
    with serving(FakeSettings(latency_s=100.0)) as server:
        engine = engine_for(server, settings={"timeout_s": 1000.0})
        pending = RoundRequests([stored(tmp_path, served, codec)], dropped.__contains__)
        plan = plan_pending(pending, pending.table(), COST)
        outputs = engine.run(pending, plan, make_policy("blend", plan))
        threading.Timer(0.5, dropped.add, (0,)).start()
        ended = list(outputs)
    assert sorted(output.index for output in ended) == list(range(NUM_LINES))
    assert {getattr(output.error, "code", None) for output in ended} == {WITHDRAWN}

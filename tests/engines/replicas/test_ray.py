"""Replicas as Ray actors on several raylets: the files are those of one machine, whatever dies."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import FakeEngine, comparable, errors_of, run_fake
from crash_cases import batch_file
from crash_cases import comparable as crash_comparable
from http_cases import assert_all_answered, write_input
from parallel_cases import FailAlways, FailOnce, FakeReplicaEngine, open_fake, plan_of_pending
from ray_cases import ray_cluster
from tiny_files import tiny_directory

from blendserve.cli import main
from blendserve.engines.http.fake_server import serving
from blendserve.engines.replicas.pool import ReplicaPool
from blendserve.engines.replicas.ray_fleet import Expected
from blendserve.engines.settings import ReplicaSettings
from blendserve.errors import ConfigError, ExecutorError
from blendserve.job.job import JobReport
from blendserve.job.pending import PendingRequests
from blendserve.request import SequenceOutput

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.50'")

NUM_REPLICAS = 2


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_cluster(1, [1]) as cluster:
        yield cluster.address


class Replicas:
    """A job's engine on replicas of `engine`; remembers what it was told."""

    def __init__(self, address: str, engine: FakeReplicaEngine, *, max_restarts: int = 2, **fields: Any) -> None:
        self.told: list[str] = []
        settings = ReplicaSettings(NUM_REPLICAS, address, num_cpus=1.0, max_restarts=max_restarts)
        expected = Expected("tiny@1", fields.pop("settings", {}))
        self.pool = ReplicaPool(settings, partial(open_fake, engine), expected, notify=self.told.append, **fields)

    def __call__(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        return self.pool.run(pending, plan_of_pending(pending))

    @property
    def ledger(self) -> Any:
        assert self.pool.ledger is not None
        return self.pool.ledger


def run(source: Path, output: Path, engine: Any) -> JobReport:
    return run_fake(source, output, engine, is_ordered=True)


def assert_same_files(output: Path, whole: Path) -> None:
    assert comparable(output) == comparable(whole)
    assert comparable(errors_of(output)) == comparable(errors_of(whole))


def test_the_files_are_those_of_one_machine(address: str, tmp_path: Path, job_input: Path, whole: Path) -> None:
    replicas = Replicas(address, FakeReplicaEngine(answer_s=0.002))
    run(job_input, tmp_path / "out.jsonl", replicas)
    assert_same_files(tmp_path / "out.jsonl", whole)
    assert replicas.ledger.num_losses == 0
    assert not any("lost" in text for text in replicas.told)
    assert not ray.is_initialized()


@pytest.mark.parametrize("is_kill", [True, False], ids=["killed", "engine fails"])
def test_a_lost_process_is_started_anew(
    address: str, tmp_path: Path, job_input: Path, whole: Path, is_kill: bool
) -> None:
    fail = FailOnce(tmp_path / "failed", at=5, is_kill=is_kill)
    replicas = Replicas(address, FakeReplicaEngine(answer_s=0.01, fail=fail))
    run(job_input, tmp_path / "out.jsonl", replicas)
    assert (tmp_path / "failed").exists()
    assert_same_files(tmp_path / "out.jsonl", whole)
    assert replicas.ledger.num_losses == 1
    assert sum("is lost (" in text for text in replicas.told) == 1


def test_an_engine_that_does_not_open_is_started_anew(
    address: str, tmp_path: Path, job_input: Path, whole: Path
) -> None:
    fail = FailOnce(tmp_path / "failed", at=0, is_kill=False)
    replicas = Replicas(address, FakeReplicaEngine(answer_s=0.01, fail_to_open=fail))
    run(job_input, tmp_path / "out.jsonl", replicas)
    assert_same_files(tmp_path / "out.jsonl", whole)
    assert sum("is lost (the device is gone)" in text for text in replicas.told) == 1


def test_an_engine_that_never_opens_ends_the_run_after_all_restarts(
    address: str, tmp_path: Path, job_input: Path
) -> None:
    engine = FakeReplicaEngine(fail_to_open=FailAlways(ExecutorError("the device is gone")))
    replicas = Replicas(address, engine, max_restarts=1)
    with pytest.raises(ExecutorError, match=r"all 2 replicas are lost \(the device is gone\)"):
        run(job_input, tmp_path / "out.jsonl", replicas)
    assert sum("is lost (" in text for text in replicas.told) == 2 * NUM_REPLICAS


def test_without_restarts_the_others_take_over(address: str, tmp_path: Path, job_input: Path, whole: Path) -> None:
    fail = FailOnce(tmp_path / "failed", at=2, is_kill=True)
    replicas = Replicas(address, FakeReplicaEngine(answer_s=0.01, fail=fail), max_restarts=0)
    run(job_input, tmp_path / "out.jsonl", replicas)
    assert_same_files(tmp_path / "out.jsonl", whole)
    assert sum("will not be started again" in text for text in replicas.told) == 1
    assert replicas.ledger.num_stolen > 0


def test_when_all_are_lost_the_same_command_goes_on(address: str, tmp_path: Path, job_input: Path, whole: Path) -> None:
    output = tmp_path / "out.jsonl"
    engine = FakeReplicaEngine(fail=FailAlways(ExecutorError("the device is gone")))
    with pytest.raises(ExecutorError, match=r"all 2 replicas are lost \(the device is gone\)"):
        run(job_input, output, Replicas(address, engine, max_restarts=0))
    report = run(job_input, output, FakeEngine("backward"))  # without Ray: the journal is the same
    assert_same_files(output, whole)
    assert report.num_lines == 60


def test_an_engine_that_a_new_process_cannot_help_ends_the_run(address: str, tmp_path: Path, job_input: Path) -> None:
    engine = FakeReplicaEngine(fail=FailAlways(ExecutorError("the server is down")))
    replicas = Replicas(address, engine, is_restartable=False)
    with pytest.raises(ExecutorError, match="the server is down"):
        run(job_input, tmp_path / "out.jsonl", replicas)


def test_replicas_that_would_answer_otherwise_are_refused(address: str, tmp_path: Path, job_input: Path) -> None:
    engine = FakeReplicaEngine(settings={"isa": "portable"})
    with pytest.raises(ConfigError, match=r"replica \d would give other answers.*isa is portable, not avx2"):
        run(job_input, tmp_path / "out.jsonl", Replicas(address, engine, settings={"isa": "avx2"}))


def test_a_driver_that_stops_leaves_the_rest_for_the_next(
    address: str, tmp_path: Path, job_input: Path, whole: Path
) -> None:
    output = tmp_path / "out.jsonl"
    replicas = Replicas(address, FakeReplicaEngine(answer_s=0.005))

    def some(pending: PendingRequests) -> Iterator[SequenceOutput]:
        for count, output in enumerate(replicas(pending)):
            if count == 30:
                raise ExecutorError("enough")
            yield output

    with pytest.raises(ExecutorError, match="enough"):
        run(job_input, output, some)
    report = run(job_input, output, Replicas(address, FakeReplicaEngine()))
    assert report.num_resumed == 30
    assert_same_files(output, whole)


def test_no_cluster_is_an_error(tmp_path: Path, job_input: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(ConfigError, match=f"no Ray cluster at 127.0.0.1:{port}"):
            run(job_input, tmp_path / "out.jsonl", Replicas(f"127.0.0.1:{port}", FakeReplicaEngine()))
    with pytest.raises(ConfigError, match="--ray-address auto"):
        run(job_input, tmp_path / "out.jsonl", Replicas("ray://127.0.0.1:10001", FakeReplicaEngine()))


def test_output_that_ray_itself_writes_is_kept_out_of_the_summary(
    address: str, tmp_path: Path, job_input: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fail = FailOnce(tmp_path / "failed", at=2, is_kill=True)
    report = run(job_input, tmp_path / "out.jsonl", Replicas(address, FakeReplicaEngine(answer_s=0.02, fail=fail)))
    assert report.num_lines == 60
    assert capfd.readouterr().out == ""
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])


def test_native_replicas_write_what_one_engine_does(
    address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, source = tiny_directory(tmp_path / "tiny"), batch_file(tmp_path / "in.jsonl", num_lines=48)
    limits = ["--kv-memory", "4MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--threads", "1"]
    command = ["run", str(source), "--model", str(model), *limits, "--ordered", "--json", "-o"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    before = signal.getsignal(signal.SIGTERM)
    assert main([*command, str(one)]) == 3  # two lines are wrong
    assert main([*command, str(two), "--replicas", "2", "--ray-address", address]) == 3  # two lines are wrong
    assert list(crash_comparable(one).items()) == list(crash_comparable(two).items())
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert summary["num_succeeded"] == 46
    assert summary["notes"][-1].startswith("2 replicas: planned load even within ")
    assert signal.getsignal(signal.SIGTERM) is before


def test_replicas_in_front_of_a_server(address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, output = write_input(tmp_path / "in.jsonl", 120), tmp_path / "out.jsonl"
    replicas = ["--replicas", "2", "--ray-address", address]
    with serving() as server:
        url = ["--engine", "http", "--base-url", server.base_url, "--max-inflight", "8"]
        assert main(["run", str(source), "-o", str(output), *url, *replicas]) == 0
    assert_all_answered(output, 120)
    captured = capfd.readouterr()
    assert "120/120 requests" in captured.err
    assert "Traceback" not in captured.err

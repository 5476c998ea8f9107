"""What each replica gets of its machine, and what the command line says where Ray is not there."""

from __future__ import annotations

import pickle
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from batch_fakes import batch_line, write_lines
from tiny_files import tiny_directory

from blendserve.cli import _parser, main
from blendserve.cli.engine_settings import replica_settings
from blendserve.config import EngineConfig
from blendserve.engine.limits import resolve_limits
from blendserve.engines.opening import open_single
from blendserve.engines.replicas import cluster
from blendserve.engines.replicas.cluster import NodeShape, ReplicaShape, open_cluster, replica_shape
from blendserve.engines.replicas.engine import check_gpus, cpus_of_each, open_replica, settings_elsewhere
from blendserve.engines.settings import ReplicaSettings
from blendserve.engines.vllm import api
from blendserve.errors import ConfigError
from blendserve.models.hub import resolve
from blendserve.models.load import load_model


@pytest.mark.parametrize(
    ("nodes", "settings", "shape"),
    [
        ([(8, 0)], ReplicaSettings(2), (4, 0, 2)),
        ([(8, 0)], ReplicaSettings(3), (2, 0, 3)),
        ([(2, 0), (2, 0), (2, 0)], ReplicaSettings(2), (2, 0, 1)),
        ([(4, 0), (1, 0)], ReplicaSettings(3), (1, 0, 3)),
        ([(8, 0)], ReplicaSettings(2, num_cpus=1.5), (1.5, 0, 2)),
        ([(2, 0)], ReplicaSettings(5, num_cpus=0), (0, 0, 5)),
        ([(16, 4), (16, 4)], ReplicaSettings(4, num_gpus=2), (8, 2, 2)),
        ([(16, 8)], ReplicaSettings(16, num_cpus=0.5, num_gpus=0.5), (0.5, 0.5, 16)),
        ([(0, 0)], ReplicaSettings(2, "auto", num_cpus=4), (4, 0, 1)),
    ],
    ids=str,
)
def test_what_a_replica_gets(
    nodes: list[tuple[float, float]], settings: ReplicaSettings, shape: tuple[float, float, int]
) -> None:
    assert replica_shape(settings, [NodeShape(*node) for node in nodes]) == shape


@pytest.mark.parametrize(
    "settings",
    [ReplicaSettings(3), ReplicaSettings(1, num_cpus=3), ReplicaSettings(1, num_gpus=1), ReplicaSettings(3, "auto")],
)
def test_replicas_without_a_place_are_refused(settings: ReplicaSettings) -> None:
    """Unless their size is given and the cluster may yet grow."""
    with pytest.raises(ConfigError, match=r"do not fit on 2 CPUs, 0 GPUs; lower --replicas"):
        replica_shape(settings, [NodeShape(2, 0)])


def arguments(*extra: str) -> Namespace:
    return _parser().parse_args(["run", "in.jsonl", "-o", "out.jsonl", *extra])


def test_threads_are_the_cpus_of_a_replica() -> None:
    def num_cpus(*extra: str) -> float | None:
        return cpus_of_each(replica_settings(arguments("--replicas", "2", *extra))).num_cpus

    assert num_cpus("--threads", "3") == 3
    assert num_cpus() is None
    assert num_cpus("--replica-cpus", "0.5") == 0.5
    assert num_cpus("--engine", "http", "--base-url", "http://localhost:1/v1") == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "see all GPUs of its machine, and all would open the first: add --replica-gpus 1"),
        (["--vllm-arg", "tensor_parallel_size=4"], "--replica-gpus 0 is too few for tensor_parallel_size=4"),
        (["--vllm-arg", "tensor_parallel_size=4", "--replica-gpus", "2"], "add --replica-gpus 4"),
        (["--vllm-arg", "tensor_parallel_size=4", "--replica-gpus", "4"], None),
        (["--replica-gpus", "0.5"], None),
    ],
    ids=str,
)
def test_replicas_of_vllm_on_gpus_are_told_how_many(
    monkeypatch: pytest.MonkeyPatch, extra: list[str], message: str | None
) -> None:
    args = arguments("--replicas", "2", "--engine", "vllm", "--model", "m", *extra)
    settings = replica_settings(args)
    assert settings.num_gpus == args.replica_gpus
    monkeypatch.setattr(api, "is_cpu_build", lambda: True)
    check_gpus(settings)
    monkeypatch.setattr(api, "is_cpu_build", lambda: False)
    if message is None:
        check_gpus(settings)
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_gpus(settings)


def test_a_replica_opens_with_the_drivers_kernels_and_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_directory(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    settings = replica_settings(arguments("--model", "tiny", "--replicas", "4"))
    sent = settings_elsewhere(settings.engine, {"isa": "portable"})
    assert sent.model == str(tmp_path / "tiny")
    assert pickle.loads(pickle.dumps(sent)) == sent
    engine = open_replica(open_single, sent, "blend", ReplicaShape(3.0, 0.0, 4))
    assert engine.settings["isa"] == "portable"
    config: EngineConfig = engine._engine._config  # type: ignore[attr-defined]
    assert (config.num_threads, config.memory_share) == (3, 0.25)


def test_replicas_of_one_machine_share_its_memory(tmp_path: Path) -> None:
    spec = load_model(resolve(str(tiny_directory(tmp_path / "tiny")), tmp_path)).spec
    config = EngineConfig(max_num_seqs=1 << 40, max_num_batched_tokens=1 << 40)
    whole = resolve_limits(config, spec).kv_memory_bytes
    half = resolve_limits(replace(config, memory_share=0.5), spec).kv_memory_bytes
    assert half == pytest.approx(whole / 2, rel=0.1)
    with pytest.raises(ConfigError, match="memory_share"):
        EngineConfig(memory_share=0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--replicas", "2"], "pip install 'ray>=2.50'"),
        (["--ray-address", "auto"], "add --replicas N"),
    ],
)
def test_without_ray_replicas_name_the_command_that_adds_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    source = write_lines(tmp_path / "in.jsonl", [batch_line("a")])
    model = tiny_directory(tmp_path / "tiny")
    assert main(["run", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", str(model), *extra]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        (None, Exception("The current node timed out during startup. This could happen"), "timed out during startup"),
        (None, RuntimeError(""), "Ray does not start on this machine: RuntimeError; its logs are below"),
        ("auto", ConnectionError("Nobody is there.\nTry again."), "no Ray cluster at auto: Nobody is there; see `ray"),
    ],
    ids=str,
)
def test_whatever_ray_raises_at_its_start_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, address: str | None, error: Exception, message: str
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setattr(cluster, "_connect", refuse)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught, open_cluster(address, 0):
        pytest.fail("there is no cluster")
    assert "\n" not in str(caught.value)

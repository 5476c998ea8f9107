"""Settings of engines: frozen, pickled, and refused where they cannot work."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from blendserve.cli import _parser
from blendserve.cli.engine_settings import engine_settings
from blendserve.config import EngineConfig
from blendserve.engines.settings import EngineSettings, HttpSettings, NativeSettings, ReplicaSettings, VllmSettings
from blendserve.errors import ConfigError
from blendserve.models.chat_settings import ChatSettings

EVERY_KIND: tuple[EngineSettings, ...] = (
    NativeSettings("m", max_num_seqs=7),
    VllmSettings("m", adapters={"a": "/b"}, arguments={"seed": 3}),
    HttpSettings("http://localhost:1/v1", max_inflight=3),
    ReplicaSettings(2, engine=VllmSettings("m")),
)


@pytest.mark.parametrize("settings", EVERY_KIND, ids=lambda settings: type(settings).__name__)
def test_settings_are_values(settings: EngineSettings) -> None:
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(FrozenInstanceError):
        setattr(settings, fields(settings)[0].name, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NativeSettings(max_num_seqs=0), "max_num_seqs is 0; it must be at least 1"),
        (lambda: NativeSettings(overlap="never"), "overlap is 'never'; it must be one of auto, on, off"),
        (lambda: NativeSettings(isa="avx9"), "isa is 'avx9'; it must be one of auto, portable"),
        (lambda: NativeSettings(window=0), "window is 0; it must be at least 1"),
        (lambda: NativeSettings(kv_memory_bytes=-1), "kv_memory_bytes is -1"),
        (lambda: VllmSettings(""), "vLLM needs a model"),
        (lambda: VllmSettings("m", task="rank"), "task is 'rank'"),  # type: ignore[arg-type]
        (lambda: VllmSettings("m", max_num_batched_tokens=0), "max_num_batched_tokens is 0"),
        (lambda: VllmSettings("m", memory_share=2.0), "memory_share is 2.0; it must be above 0 and at most 1"),
        (lambda: HttpSettings("u", max_inflight=0), "max_inflight is 0; it must be at least 1"),
        (lambda: HttpSettings("u", request_timeout_s=0), "request_timeout_s is 0; it must be a number of seconds"),
        (lambda: HttpSettings("u", max_outage_s=float("inf")), "max_outage_s is inf"),
        (lambda: ReplicaSettings(0), "num_replicas is 0; it must be at least 1"),
        (lambda: ReplicaSettings(2, placement="here"), "placement is 'here'"),  # type: ignore[arg-type]
        (lambda: ReplicaSettings(2, num_cpus=-1), "num_cpus is -1; it must be at least 0, or None"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_limits_that_are_not_given_are_the_native_engines_own() -> None:
    assert NativeSettings().config() == EngineConfig()
    assert NativeSettings(max_num_seqs=9, num_threads=2).config() == EngineConfig(max_num_seqs=9, num_threads=2)


def parsed(*options: str) -> argparse.Namespace:
    return _parser().parse_args(["run", "in.jsonl", "-o", "out.jsonl", *options])


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), NativeSettings()),
        (("--engine", "vllm", "--model", "m"), VllmSettings("m")),
        (("--engine", "http", "--base-url", "http://h/v1"), HttpSettings("http://h/v1")),
        (("--replicas", "3"), ReplicaSettings(3)),
    ],
)
def test_options_that_are_not_given_are_the_settings_defaults(
    options: tuple[str, ...], settings: EngineSettings
) -> None:
    """The command line has no defaults of its own."""
    assert engine_settings(parsed(*options)) == settings


def test_every_option_reaches_its_field() -> None:
    native: dict[str, Any] = {
        "model": "m",
        "max_model_len": 64,
        "kv_memory_bytes": 2**30,
        "max_num_seqs": 9,
        "max_num_batched_tokens": 99,
        "num_threads": 3,
        "enable_prefix_caching": False,
        "overlap": "off",
        "dtype": "int8",
        "kv_dtype": "int8",
        "isa": "portable",
        "window": 5,
        "revision": "v1",
        "chat": ChatSettings("t.jinja", {"a": 1}, "2026-01-02", "hermes", "none", "obey"),
        "generation_config": "vllm",
    }
    options = "--model m --max-model-len 64 --kv-memory 1GiB --max-num-seqs 9 --max-num-batched-tokens 99 --threads 3"
    own = "--no-prefix-caching --overlap off --dtype int8 --kv-dtype int8 --isa portable --window 5 --revision v1"
    own += " --generation-config vllm"
    chat = "--tool-format hermes --reasoning-format none --control-tokens obey --template-date 2026-01-02"
    chat += ' --chat-template t.jinja --chat-template-kwargs {"a":1}'
    assert engine_settings(parsed(*options.split(), *own.split(), *chat.split())) == NativeSettings(**native)
    assert {field.name for field in fields(NativeSettings)} == {*native, "memory_share"}
    http = "--base-url u --max-inflight 2 --kv-tokens 7 --request-timeout 5 --max-attempts 4 --max-outage 9"
    named = "--tokenizer t --model m"
    assert engine_settings(parsed("--engine", "http", *http.split(), *named.split())) == HttpSettings(
        "u", "m", "t", max_inflight=2, kv_tokens=7, request_timeout_s=5, max_attempts=4, max_outage_s=9
    )
    vllm = "--task embed --vllm-scheduler blend --own-process --vllm-arg seed=3 --no-prefix-caching"
    fetched = "--revision v1 --image-domain a.b --generation-config d"
    assert engine_settings(
        parsed("--engine", "vllm", *options.split(), *vllm.split(), *fetched.split())
    ) == VllmSettings(
        "m",
        64,
        2**30,
        9,
        99,
        3,
        False,
        task="embed",
        scheduler="blend",
        own_process=True,
        arguments={"seed": 3},
        revision="v1",
        image_domains=("a.b",),
        generation_config="d",
    )
    replicas = "--replicas 4 --ray-address auto --replica-cpus 2 --replica-gpus 1 --placement pack --max-restarts 0"
    assert engine_settings(parsed(*replicas.split())) == ReplicaSettings(4, "auto", 2.0, 1.0, "pack", 0)

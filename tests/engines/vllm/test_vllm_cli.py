"""`blendserve run --engine vllm` from the command line, on the fake."""

from __future__ import annotations

import json
import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from batch_fakes import read_rows
from http_cases import assert_nowhere
from tiny_files import tiny_directory
from vllm_cases import chat

from blendserve.cli import main
from blendserve.cli.engine_settings import parse_argument, read_adapters
from blendserve.costs.model_cost import ModelCost
from blendserve.engines.settings import VllmSettings
from blendserve.engines.vllm import api as vllm_api
from blendserve.engines.vllm import arguments as vllm_arguments
from blendserve.engines.vllm import engine as vllm_engine
from blendserve.engines.vllm.arguments import (
    context_length_of,
    default_kv_memory,
    largest_rank,
    lora_slots,
    prepare_environment,
)
from blendserve.engines.vllm.fake import FakeVllm
from blendserve.errors import ConfigError
from blendserve.job.pending import plan_pending
from blendserve.planner.plan import Plan


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_directory(tmp_path / "tiny")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake = FakeVllm()
    monkeypatch.setattr(vllm_engine, "InstalledVllm", lambda: fake)
    monkeypatch.setattr(vllm_engine, "prepare_environment", lambda *_: None)
    return fake


def job(tmp_path: Path, *lines: str) -> list[str]:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    return ["run", str(source), "-o", str(tmp_path / "out.jsonl"), "--engine", "vllm", "--json"]


def summary(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_job_from_the_command_line(
    tmp_path: Path, model: Path, api: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [chat(f"id-{n}", "the capital of france", max_tokens=2 + n, ignore_eos=True) for n in range(9)]
    options = ["--max-num-seqs", "5", "--vllm-arg", "dtype=float32", "--image-domain", "Pictures.example"]
    command = [*job(tmp_path, *lines), "--model", str(model), *options]
    assert main(command) == 0
    told = summary(capsys)
    assert told["num_succeeded"] == 9
    assert told["num_output_tokens"] == sum(2 + n for n in range(9))
    assert told["max_running"] >= 1
    assert "prefix hits" in told["notes"][0]
    assert len(read_rows(tmp_path / "out.jsonl")) == 9
    (arguments,) = api.opened
    assert arguments["model"] == str(model)
    assert arguments["max_num_seqs"] == 5
    assert arguments["dtype"] == "float32"
    assert arguments["allowed_media_domains"] == ["pictures.example"]
    assert "scheduler_cls" not in arguments
    assert "max_model_len" not in arguments
    assert api.engines[0].is_closed
    assert main(command) == 0
    assert summary(capsys)["was_complete"]
    assert len(api.opened) == 1  # a finished job opens nothing


def test_a_context_length_reaches_vllm_where_one_is_given(tmp_path: Path, model: Path, api: FakeVllm) -> None:
    command = [*job(tmp_path, chat("a", "hello", max_tokens=2)), "--model", str(model), "--max-model-len", "64"]
    assert main(command) == 0
    assert api.opened[0]["max_model_len"] == 64


@pytest.mark.parametrize(
    ("options", "told_to_vllm"),
    [
        ((), None),
        (("--generation-config", "vllm"), "vllm"),
        (("--vllm-arg", "generation_config=vllm"), "vllm"),
    ],
)
def test_sampling_of_the_model_reaches_vllm(
    options: tuple[str, ...],
    told_to_vllm: str | None,
    tmp_path: Path,
    model: Path,
    api: FakeVllm,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """vLLM's engine does not read it for us: only its server does."""
    (model / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    lines = [chat("own", "hello", max_tokens=6, ignore_eos=True), chat("model's", "hello", ignore_eos=True)]
    limit = ["--max-model-len", "32"]
    assert main([*job(tmp_path, *lines), "--model", str(model), *limit, *options]) == 0
    told = summary(capsys)
    assert any("gave max_tokens 3" in note for note in told["notes"]) == (not options)
    assert api.opened[0].get("generation_config") == told_to_vllm
    used = {row["custom_id"]: row["response"]["body"]["usage"] for row in read_rows(tmp_path / "out.jsonl")}
    assert used["own"]["completion_tokens"] == 6
    assert (used["model's"]["completion_tokens"] == 3) == (not options)


@pytest.mark.parametrize("is_cpu", [False, True])
def test_limits_that_are_not_given_stay_vllms_own(
    tmp_path: Path, model: Path, api: FakeVllm, monkeypatch: pytest.MonkeyPatch, is_cpu: bool
) -> None:
    monkeypatch.setattr(vllm_engine, "is_cpu_build", lambda: is_cpu)
    assert main([*job(tmp_path, chat("a", "hello", max_tokens=2)), "--model", str(model)]) == 0
    (arguments,) = api.opened
    assert not {"max_num_seqs", "max_num_batched_tokens", "max_model_len"} & set(arguments)
    assert ("kv_cache_memory_bytes" in arguments) == is_cpu  # vLLM on a CPU would take memory that is not free


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_the_plan_is_made_in_the_blocks_that_vllm_chose(
    tmp_path: Path, model: Path, api: FakeVllm, monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    plans: list[Plan] = []
    make_plan = plan_pending

    def noting(*args: Any, **options: Any) -> Plan:
        plans.append(make_plan(*args, **options))
        return plans[-1]

    monkeypatch.setattr(vllm_engine, "plan_pending", noting)
    api.block_size = block_size
    lines = [chat(f"id-{n}", "the same long beginning " * 12 + str(n), max_tokens=2) for n in range(4)]
    assert main([*job(tmp_path, *lines), "--model", str(model)]) == 0
    (plan,) = plans
    shared = int(plan.prompt_tree.leaf_lcp.max())
    assert shared > 128
    assert int(plan.tree.leaf_lcp.max()) == shared // block_size * block_size


def test_a_death_is_told_and_survived(
    tmp_path: Path, model: Path, api: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    api.dies_at = frozenset({2})
    assert main([*job(tmp_path, chat("a", "hello", max_tokens=5, ignore_eos=True)), "--model", str(model)]) == 0
    captured = capsys.readouterr()
    assert "fell off the bus" in captured.err
    assert "1 restarts" in json.loads(captured.out)["notes"][0]


def test_the_scheduler_is_ours_where_it_was_tested(
    tmp_path: Path, model: Path, api: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*job(tmp_path, chat("a", "hello", max_tokens=2)), "--model", str(model), "--vllm-scheduler", "blend"]
    assert main(command) == 0
    assert "scheduler_cls" in api.opened[0]
    api.version = "0.33.1"
    assert main([*command, "--fresh"]) == 0
    assert "scheduler_cls" not in api.opened[1]
    assert "not tested" in capsys.readouterr().out
    api.version = "0.32.4"
    assert main([*command, "--fresh", "--own-process"]) == 0
    assert "scheduler_cls" not in api.opened[2]
    assert "process of its own" in capsys.readouterr().out


def test_adapters_and_tasks_reach_vllm(tmp_path: Path, model: Path, api: FakeVllm) -> None:
    for name, rank in (("one", 4), ("two", 33)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
    adapters = ["--lora", f"one={tmp_path / 'one'}", "--lora", f"two={tmp_path / 'two'}"]
    command = [*job(tmp_path, chat("a", "hello", model="two", max_tokens=2)), "--model", str(model)]
    assert main([*command, *adapters]) == 0
    assert (api.opened[0]["max_loras"], api.opened[0]["max_lora_rank"]) == (2, 64)
    assert read_rows(tmp_path / "out.jsonl")[0]["response"]["body"]["model"] == "two"
    assert main([*command, "--task", "embed", "--fresh"]) == 3, "no line asks for an embedding"
    assert (tmp_path / "out.errors.jsonl").exists()  # a chat is no embedding


def test_an_adapter_is_part_of_the_job(
    tmp_path: Path, model: Path, api: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*job(tmp_path, chat("a", "hello", max_tokens=2)), "--model", str(model)]
    assert main(command) == 0
    assert main([*command, "--task", "embed"]) == 1
    assert "task was generate, is embed" in capsys.readouterr().err
    assert len(api.opened) == 1


def test_secrets_given_to_vllm_are_in_no_journal_and_no_message(
    tmp_path: Path, model: Path, api: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*job(tmp_path, chat("a", "hello", max_tokens=2)), "--model", str(model)]
    secret = ["--vllm-arg", "hf_token=hf_0123456789", "--vllm-arg", "max_num_batched_tokens=77"]
    assert main([*command, *secret]) == 0
    assert api.opened[0]["hf_token"] == "hf_0123456789"
    assert_nowhere("hf_0123456789", tmp_path / "out.jsonl.journal")
    assert main([*command, "--vllm-arg", "hf_token=hf_another"]) == 1, "the other argument is part of the job"
    assert main([*command, "--vllm-arg", "hf-token=hf_0123456789"]) == 1
    said = str(capsys.readouterr())
    assert "max_num_batched_tokens=77" in said
    assert "hf-token is not understood" in said
    assert "hf_0123456789" not in said
    assert vllm_api.without_secrets("bad hf_0", {"hf_token": "hf_0", "key": "", "seed": 0}) == "bad [hf_token]"
    nested = {"model_loader_extra_config": {"s3_secret_access_key": "abc", "s3_region": "x"}}
    assert vllm_api.without_secrets("bad abc", nested) == "bad [s3_secret_access_key]"
    assert vllm_api.hide_secrets(nested) == {
        "model_loader_extra_config": {"s3_secret_access_key": "hidden", "s3_region": "x"}
    }


def test_without_vllm_the_error_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if vllm_api.installed_version() is not None:
        pytest.skip("vLLM is installed here")
    assert main([*job(tmp_path, chat("a", "hello")), "--model", "somewhere"]) == 1
    assert "pip install 'vllm>=0.32'" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "complaint"), [([], "needs --model"), (["--model", "GGUF"], "is a GGUF file")])
def test_a_model_in_the_right_form_is_needed(
    tmp_path: Path, api: FakeVllm, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    (tmp_path / "x.gguf").touch()
    given = [str(tmp_path / "x.gguf") if option == "GGUF" else option for option in options]
    assert main([*job(tmp_path, chat("a", "hello")), *given]) == 1
    assert complaint in capsys.readouterr().err
    assert not api.opened


def test_the_environment_is_prepared_and_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_arguments, "is_cpu_build", lambda: True)
    environment = {"OMP_NUM_THREADS": "7"}
    prepare_environment(environment, VllmSettings("m", own_process=False, num_threads=3))
    assert environment["OMP_NUM_THREADS"] == "7"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    on_gpu: dict[str, str] = {}
    monkeypatch.setattr(vllm_arguments, "is_cpu_build", lambda: False)
    prepare_environment(on_gpu, VllmSettings("m", own_process=True, num_threads=3))
    assert on_gpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert "OMP_NUM_THREADS" not in on_gpu


def test_options_are_read_or_refused(tmp_path: Path) -> None:
    assert parse_argument("tensor_parallel_size=2") == ("tensor_parallel_size", 2)
    assert parse_argument("dtype=float32") == ("dtype", "float32")
    assert parse_argument("enforce_eager=true") == ("enforce_eager", True)
    for wrong in ("x", "=3", "a-b=3"):
        with pytest.raises(ConfigError, match="NAME=VALUE"):
            parse_argument(wrong)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert read_adapters([f"a={tmp_path}"]) == {"a": str(tmp_path)}
    assert largest_rank({"a": str(tmp_path)}) == 8
    assert (lora_slots(2, is_cpu=False), lora_slots(2, is_cpu=True)) == (2, 3)
    for options in (["a"], [f"={tmp_path}"], [f"a={tmp_path}", f"a={tmp_path}"], [f"a={tmp_path / 'none'}"]):
        with pytest.raises(ConfigError, match="NAME=PATH"):
            read_adapters(options)


def test_scaled_positions_make_the_context_longer() -> None:
    assert context_length_of({}) == 0
    assert context_length_of({"max_position_embeddings": 100, "rope_scaling": None}) == 100
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert context_length_of({"max_position_embeddings": 120, "rope_scaling": scaling}) == 400
    assert context_length_of({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 2}}) == 200
    llama = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    assert context_length_of({"max_position_embeddings": 131072, "rope_parameters": llama}) == 131072


def test_kv_memory_is_no_more_than_requests_could_fill() -> None:
    model = ModelCost("m", 1, 1, 1, 1, kv_bytes_per_token=10.0, weight_bytes=1)
    assert default_kv_memory(model, 4, 100, most_bytes=10**6) == 4000
    assert default_kv_memory(model, 10**9, 10**9, most_bytes=10**6) == 10**6


def test_releases_are_told_apart() -> None:
    assert [vllm_api.is_tested(release) for release in ("0.32.0", "0.32", "0.3", "0.320", "0.33.0")] == [
        True,
        True,
        False,
        False,
        False,
    ]


class CoreElsewhere:
    """The client of an engine in a process of its own, as far as a death concerns it."""

    def __init__(self) -> None:
        self.outputs_queue: queue.Queue[object] = queue.Queue()
        self.resources = SimpleNamespace(engine_dead=False)


def test_a_step_that_waits_for_a_dead_process_is_woken() -> None:
    core = CoreElsewhere()
    vllm_api.wake_on_death(core, interval_s=0.001)
    with pytest.raises(queue.Empty):
        core.outputs_queue.get(timeout=0.05)
    core.resources.engine_dead = True
    assert isinstance(core.outputs_queue.get(timeout=10.0), ConnectionError)


def test_an_engine_that_is_dropped_is_watched_no_more() -> None:
    core = CoreElsewhere()
    before = set(threading.enumerate())
    vllm_api.wake_on_death(core, interval_s=0.001)
    (watch,) = set(threading.enumerate()) - before
    del core
    watch.join(timeout=10.0)
    assert not watch.is_alive()
    vllm_api.wake_on_death(object())
    assert set(threading.enumerate()) == before

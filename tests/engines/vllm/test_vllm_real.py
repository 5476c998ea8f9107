"""The vLLM engine on the installed vLLM, with a tiny random model: scripts/test-vllm runs this where vLLM is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from batch_fakes import read_rows
from vllm_cases import chat, line
from vllm_real_cases import SPEC, model, pytestmark

from blendserve.dialect.extras import Abilities
from blendserve.dialect.schema import ServedModel
from blendserve.dialect.urls import EMBEDDINGS_URL, TEXT_URLS
from blendserve.engine.planned import plan_requests
from blendserve.engines.estimates import remote_cost
from blendserve.engines.vllm.api import InstalledVllm, is_cpu_build, is_tested
from blendserve.engines.vllm.arguments import lora_slots
from blendserve.engines.vllm.codec import VllmCodec
from blendserve.engines.vllm.cost import LoadTotals, model_cost_of
from blendserve.engines.vllm.driver import VllmDriver
from blendserve.engines.vllm.formats import PARSERS
from blendserve.engines.vllm.queue import PolicyQueue
from blendserve.errors import ConfigError
from blendserve.job.job import BatchJob, JobReport
from blendserve.job.pending import PendingRequests
from blendserve.job.run import run_job
from blendserve.models.hub import ModelFiles
from blendserve.models.load import load_tokenizer
from blendserve.models.tool_formats.format import ParsedAnswer, Tool, ToolCall
from blendserve.models.tool_formats.table import TOOL_FORMATS
from blendserve.planner.policies import make_policy

__all__ = ["model", "pytestmark"]

CONTEXT = 512
NUM_BLOCKS = 40
SYNC = "blendserve.engines.vllm.scheduler.BlendScheduler"
ASYNC = "blendserve.engines.vllm.scheduler.BlendAsyncScheduler"


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    """What `cli.vllm_run` sets before vLLM is imported; one thread, which needs no barrier."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


def arguments(model: Path, **changes: Any) -> dict[str, Any]:
    kv_bytes = NUM_BLOCKS * 32 * 2 * SPEC.kv_bytes_per_token()  # float32
    fields = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": CONTEXT,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": kv_bytes,
        "block_size": 32,
        "enforce_eager": True,
        "disable_log_stats": False,
        "enable_mfu_metrics": True,
    }
    return fields | changes


def engine_of(model: Path, adapters: dict[str, str] | None = None, **changes: Any) -> VllmDriver:
    totals = LoadTotals(model_cost_of("tiny", json.loads((model / "config.json").read_text())))
    embeds = changes.get("runner") == "pooling"
    return VllmDriver(InstalledVllm(), arguments(model, **changes), adapters or {}, embeds=embeds, totals=totals)


def run(
    engine: VllmDriver,
    model: Path,
    lines: list[str],
    target: Path,
    *,
    policy: str = "blend",
    adapters: tuple[str, ...] = (),
) -> JobReport:
    source = target.with_suffix(".in.jsonl")
    source.write_text("\n".join(lines))
    urls = (EMBEDDINGS_URL,) if engine.embeds else TEXT_URLS
    abilities = Abilities(adapters=adapters, urls=urls, checks_grammars=False)  # as with a backend of the user's
    served = ServedModel(("tiny",), vocab_size=SPEC.vocab_size, max_model_len=CONTEXT, abilities=abilities)
    codec = VllmCodec(load_tokenizer(ModelFiles("tiny", model)), {}, CONTEXT)

    def generate(pending: PendingRequests) -> Any:
        plan = plan_requests(pending.flat_prompts(), pending.table(), remote_cost())
        return engine.run(pending, plan, make_policy(policy, plan))

    return run_job(BatchJob(source, target, served, "tiny"), codec, generate, clock=lambda: 1.0)


def greedy_lines(count: int) -> list[str]:
    shared = "the capital of france is paris and the answer to the question is in the text that the user gave before. "
    return [
        chat(
            f"id-{n}", (shared * (n % 3)) + f"question {n}", max_tokens=4 + 9 * (n % 5), temperature=0, ignore_eos=True
        )
        for n in range(count)
    ]


def answers(target: Path) -> dict[str, Any]:
    return {row["custom_id"]: row["response"]["body"]["choices"] for row in read_rows(target)}


@pytest.fixture(scope="module")
def front(model: Path) -> Iterator[VllmDriver]:
    engine = engine_of(model)
    engine.open()
    yield engine
    engine.close()


def test_this_release_is_tested() -> None:
    assert is_tested(str(InstalledVllm().version)), "add the release to TESTED_RELEASES once these tests pass on it"


def test_the_front_door_answers_and_counts(front: VllmDriver, model: Path, tmp_path: Path) -> None:
    report = run(front, model, greedy_lines(30), tmp_path / "out.jsonl")
    assert report.num_succeeded == 30
    assert report.num_output_tokens == sum(4 + 9 * (n % 5) for n in range(30))
    counters = front.counters
    assert counters.num_hit_tokens > 0
    assert 0 < counters.max_kv_use <= 1
    assert counters.num_preemptions == 0
    assert front.open().num_blocks == NUM_BLOCKS - 1
    assert counters.num_flop > 0
    assert front.totals is not None
    assert 0.5 < front.totals.num_flop / counters.num_flop < 2
    by_id = {row["custom_id"]: row["response"]["body"]["usage"] for row in read_rows(tmp_path / "out.jsonl")}
    assert sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in by_id.values()) == report.num_cached_tokens
    assert report.num_cached_tokens > 0


def test_every_parameter_is_taken(front: VllmDriver, model: Path, tmp_path: Path) -> None:
    full = {
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.01,
        "seed": 7,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "max_tokens": 9,
        "stop_token_ids": [5],
        "stop": ["zzz"],
    }
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    lines = [
        chat("full", "hello", **full, n=2),
        chat("again", "hello", **full, n=2),
        chat("logprobs", "hello", max_tokens=4, temperature=0, logprobs=True, top_logprobs=3, ignore_eos=True),
        chat("bias", "hello", max_tokens=4, temperature=0, logit_bias={"65": 100}, ignore_eos=True),
        chat("choice", "hello", max_tokens=8, temperature=0, structured_outputs={"choice": ["the answer"]}),
        chat(
            "schema",
            "hello",
            max_tokens=64,
            temperature=0,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        ),
        line("text", "/v1/completions", prompt="the capital", max_tokens=3, temperature=0, logprobs=2, ignore_eos=True),
        chat("bad", "hello", max_tokens=4, structured_outputs={"regex": "(((("}),
    ]
    run(front, model, lines, tmp_path / "out.jsonl")
    found = answers(tmp_path / "out.jsonl")
    assert len(found["full"]) == 2
    assert found["full"] == found["again"]  # seeds hold
    content = found["logprobs"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [3, 3, 3, 3]
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in content)  # greedy
    tokenizer = load_tokenizer(ModelFiles("tiny", model))
    assert found["bias"][0]["message"]["content"] == tokenizer.decode([65] * 4)
    assert found["choice"][0]["message"]["content"] == "the answer"
    assert found["schema"][0]["finish_reason"] == "length" or json.loads(found["schema"][0]["message"]["content"])
    assert found["schema"][0]["message"]["content"].lstrip().startswith("{")
    assert len(found["text"][0]["logprobs"]["token_logprobs"]) == 3
    (row,) = read_rows(tmp_path / "out.errors.jsonl")
    assert row["custom_id"] == "bad"
    assert row["response"]["body"]["error"]["code"] == "invalid_value"


def test_an_engine_that_dies_is_opened_again(front: VllmDriver, model: Path, tmp_path: Path) -> None:
    run(front, model, greedy_lines(16), tmp_path / "undisturbed.jsonl")
    inside = front.engine
    assert inside is not None
    step, count = inside.step, iter(range(10**6))

    def failing() -> Any:
        if next(count) == 5:
            raise RuntimeError("the device fell off the bus")
        return step()

    inside.step = failing
    told: list[str] = []
    front.notify = told.append
    report = run(front, model, greedy_lines(16), tmp_path / "out.jsonl")
    assert report.num_succeeded == 16
    assert front.num_restarts == 1
    assert front.engine is not inside
    assert "fell off the bus" in told[0]
    assert answers(tmp_path / "out.jsonl") == answers(tmp_path / "undisturbed.jsonl")


@pytest.mark.parametrize("scheduler", [SYNC, ASYNC])
def test_our_scheduler_gives_the_same_answers(model: Path, tmp_path: Path, scheduler: str) -> None:
    engine = engine_of(model, scheduler_cls=scheduler)
    plain = engine_of(model)
    try:
        plain.open()
        run(plain, model, greedy_lines(24), tmp_path / "front.jsonl")
        plain.close()
        engine.open()
        core = engine.api.scheduler_of(engine.engine)
        assert core is not None
        assert isinstance(core.waiting, PolicyQueue)
        assert type(core).__name__ == scheduler.rpartition(".")[2]
        for policy in ("blend", "dfs"):
            target = tmp_path / f"{policy}.jsonl"
            report = run(engine, model, greedy_lines(24), target, policy=policy)
            assert report.num_succeeded == 24
            assert answers(target) == answers(tmp_path / "front.jsonl")
        assert engine.counters.num_hit_tokens > 0
    finally:
        plain.close()
        engine.close()


def test_our_scheduler_lives_with_preemption_and_grammars(model: Path, tmp_path: Path) -> None:
    lines = [chat(f"id-{n}", f"{n}", max_tokens=300, temperature=0, ignore_eos=True) for n in range(12)]
    lines += [
        chat(f"g-{n}", f"{n}", max_tokens=8, temperature=0, structured_outputs={"choice": [f"text {n}"]})
        for n in range(12)
    ]
    engine = engine_of(model, scheduler_cls=SYNC)
    try:
        report = run(engine, model, lines, tmp_path / "out.jsonl", policy="fcfs")
        assert report.num_succeeded == 24
        assert engine.counters.num_preemptions > 0
        found = answers(tmp_path / "out.jsonl")
        assert [found[f"g-{n}"][0]["message"]["content"] for n in range(12)] == [f"text {n}" for n in range(12)]
    finally:
        engine.close()


def test_embeddings(model: Path, tmp_path: Path) -> None:
    lines = [
        line("one", "/v1/embeddings", input="the capital of france"),
        line("two", "/v1/embeddings", input=["the capital of france", "another text"]),
        line("packed", "/v1/embeddings", input="the capital of france", encoding_format="base64"),
        line("cut", "/v1/embeddings", input="the capital of france", dimensions=8),
    ]
    engine = engine_of(model, runner="pooling", convert="embed")
    try:
        run(engine, model, lines, tmp_path / "out.jsonl")
    finally:
        engine.close()
    by_id = {row["custom_id"]: row["response"]["body"]["data"] for row in read_rows(tmp_path / "out.jsonl")}
    assert len(by_id["one"][0]["embedding"]) == SPEC.hidden_size
    np.testing.assert_allclose(by_id["two"][0]["embedding"], by_id["one"][0]["embedding"], atol=1e-4)
    assert by_id["two"][1]["embedding"] != by_id["two"][0]["embedding"]
    assert isinstance(by_id["packed"][0]["embedding"], str)
    (row,) = read_rows(tmp_path / "out.errors.jsonl")  # the model was not made for cut vectors
    assert row["custom_id"] == "cut"


def test_an_adapter_changes_the_lines_that_name_it(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    write_adapter(adapter)
    ask = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    lines = [chat("base", "hello there", **ask), chat("loud", "hello there", model="loud", **ask)]
    changes = {"enable_lora": True, "max_loras": lora_slots(1, is_cpu=is_cpu_build()), "max_lora_rank": 8}
    engine = engine_of(model, {"loud": str(adapter)}, **changes)
    try:
        run(engine, model, lines[:1], tmp_path / "alone.jsonl", adapters=("loud",))
        run(engine, model, lines, tmp_path / "out.jsonl", adapters=("loud",))
    finally:
        engine.close()
    by_id = {row["custom_id"]: row["response"]["body"] for row in read_rows(tmp_path / "out.jsonl")}
    assert (by_id["base"]["model"], by_id["loud"]["model"]) == ("tiny", "loud")
    assert by_id["base"]["choices"] != by_id["loud"]["choices"]
    assert (
        by_id["base"]["choices"] == answers(tmp_path / "alone.jsonl")["base"]
    )  # though one with an adapter ran beside


def write_adapter(path: Path) -> None:
    """A LoRA adapter of rank 8 on q and v, large enough to be noticed."""
    path.mkdir()
    source = np.random.default_rng(3)
    tensors = {}
    for layer in range(SPEC.num_layers):
        for name, width in (("q_proj", SPEC.num_heads * SPEC.head_dim), ("v_proj", SPEC.kv_width)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = source.normal(size=(8, SPEC.hidden_size)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = source.normal(size=(width, 8)).astype(np.float32)
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "tiny",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))


def test_the_build_is_known() -> None:
    import vllm.platforms

    assert is_cpu_build() == vllm.platforms.current_platform.is_cpu()


def test_calls_are_read_by_vllms_own_parsers(model: Path) -> None:
    api = InstalledVllm()
    tools = (Tool("f", {"type": "object", "properties": {"a": {"type": "integer"}}}),)
    calls = (ToolCall("f", '{"a": 1}'),)
    for name in ("hermes", "qwen3_coder"):
        text = "Well: " + TOOL_FORMATS[name].write_calls(calls)
        assert api.parse_calls(PARSERS[name], str(model), text, tools) == ParsedAnswer("Well:", calls)
        assert api.parse_calls(PARSERS[name], str(model), "no call", tools) == ParsedAnswer("no call")
    for name in PARSERS.values():
        api.check_parser(name)
    with pytest.raises(ConfigError, match="has a format of that name"):
        api.check_parser("no-such-parser")

"""Jobs on the fake vLLM: every request ends once, whatever the engine does, by either way in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_fakes import read_rows
from vllm_cases import BY_SCHEDULER, EMBEDDER, StopError, chat, check_rows, line, mixed_job, run_vllm, vllm_engine

from blendserve.dialect.extras import Abilities
from blendserve.dialect.schema import ServedModel
from blendserve.dialect.urls import EMBEDDINGS_URL
from blendserve.engines.vllm.driver import MAX_DEATHS
from blendserve.engines.vllm.fake import FakeEngine, FakeEngineDeadError, FakeVllm
from blendserve.errors import ExecutorError
from blendserve.planner.policies import POLICY_NAMES

NUM_LINES = 60
WAYS = pytest.mark.parametrize("arguments", [{}, BY_SCHEDULER], ids=["front", "scheduler"])


def answers(target: Path) -> dict[str, Any]:
    """Choices by custom_id: what must not depend on how a run went."""
    return {row["custom_id"]: row["response"]["body"]["choices"] for row in read_rows(target)}


@WAYS
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_line_is_answered_under_every_policy(tmp_path: Path, policy: str, arguments: dict[str, Any]) -> None:
    source, target = mixed_job(tmp_path / "in.jsonl", NUM_LINES), tmp_path / "out.jsonl"
    api = FakeVllm()
    engine = vllm_engine(api, arguments)
    report = run_vllm(engine, source, target, policy=policy)
    assert check_rows(target, NUM_LINES) == {"answer": NUM_LINES}
    assert report.num_succeeded == NUM_LINES
    assert sorted(api.engines[0].order, key=int) == [str(index) for index in range(NUM_LINES)]
    assert engine.stats is not None
    assert engine.stats.num_finished == NUM_LINES
    assert len(engine.stats.scheduling_s_by_step) == engine.stats.num_steps
    assert engine.counters.max_running <= api.max_num_seqs
    assert api.engines[0].scheduler.num_free == api.num_blocks - 1


def test_both_ways_give_the_same_answers(tmp_path: Path) -> None:
    source = mixed_job(tmp_path / "in.jsonl", NUM_LINES)
    for name, arguments in (("front", {}), ("scheduler", BY_SCHEDULER)):
        run_vllm(vllm_engine(FakeVllm(), arguments), source, tmp_path / f"{name}.jsonl")
    assert answers(tmp_path / "front.jsonl") == answers(tmp_path / "scheduler.jsonl")


def test_the_front_door_never_lets_memory_run_over(tmp_path: Path) -> None:
    """Known lengths: what the window lets in is never preempted, though the memory is far too small for all at once."""
    lines = [chat(f"id-{n}", "x" * (40 + n), max_tokens=60 + 40 * (n % 4), ignore_eos=True) for n in range(40)]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    engine = vllm_engine(FakeVllm(num_blocks=21, max_num_seqs=16))
    run_vllm(engine, source, tmp_path / "out.jsonl", policy="fcfs")
    assert engine.counters.num_preemptions == 0
    assert engine.counters.max_kv_use > 0.6
    assert engine.counters.max_running > 2


def test_the_scheduler_gives_preempted_requests_back(tmp_path: Path) -> None:
    lines = [chat(f"id-{n}", "x" * (40 + n), max_tokens=120 + 40 * (n % 4), ignore_eos=True) for n in range(24)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    engine = vllm_engine(FakeVllm(num_blocks=17, max_num_seqs=16), BY_SCHEDULER)
    run_vllm(engine, source, target, policy="fcfs")
    assert engine.counters.num_preemptions > 0
    assert check_rows(target, 24) == {"answer": 24}


def test_preemptions_are_those_of_a_run_though_engines_outlive_it(tmp_path: Path) -> None:
    lines = [chat(f"id-{n}", "x" * (40 + n), max_tokens=120 + 40 * (n % 4), ignore_eos=True) for n in range(24)]
    many, one = tmp_path / "many.jsonl", tmp_path / "one.jsonl"
    many.write_text("\n".join(lines))
    one.write_text(lines[0])
    engine = vllm_engine(FakeVllm(num_blocks=17, max_num_seqs=16), BY_SCHEDULER)
    run_vllm(engine, many, tmp_path / "many-out.jsonl", policy="fcfs")
    assert engine.stats is not None
    assert engine.stats.num_preemptions == engine.counters.num_preemptions > 0
    run_vllm(engine, one, tmp_path / "one-out.jsonl", policy="fcfs")
    assert engine.stats.num_preemptions == 0


def test_the_window_is_wider_where_the_engine_is_far(tmp_path: Path) -> None:
    source = mixed_job(tmp_path / "in.jsonl", NUM_LINES)
    for is_far, most in ((False, 4), (True, 6)):
        api = FakeVllm(num_blocks=1025, max_num_seqs=4, has_own_process=is_far)
        engine = vllm_engine(api, BY_SCHEDULER if is_far else {})
        if is_far:  # a scheduler that is out of reach serves whoever comes first
            api.opened.clear()
        seen: list[int] = []
        engine.open()
        inside = engine.engine
        assert inside is not None
        step = inside.step

        def counted(step: Any = step, inside: Any = inside, seen: list[int] = seen) -> Any:
            seen.append(len(inside._requests))
            return step()

        inside.step = counted
        run_vllm(engine, source, tmp_path / f"{most}.jsonl", policy="fcfs")
        assert max(seen) == most


@WAYS
def test_a_refused_request_is_a_row(tmp_path: Path, arguments: dict[str, Any]) -> None:
    source, target = mixed_job(tmp_path / "in.jsonl", NUM_LINES), tmp_path / "out.jsonl"
    engine = vllm_engine(FakeVllm(refuses=frozenset({"3", "41"})), arguments)
    run_vllm(engine, source, target)
    assert check_rows(target, NUM_LINES) == {"answer": NUM_LINES - 2, "invalid_value": 2}
    (first, _) = read_rows(target.with_suffix(".errors.jsonl"))
    assert "not to the engine's liking" in first["response"]["body"]["error"]["message"]


@WAYS
def test_a_dead_engine_is_opened_again_and_nothing_is_lost(tmp_path: Path, arguments: dict[str, Any]) -> None:
    source, target = mixed_job(tmp_path / "in.jsonl", NUM_LINES), tmp_path / "out.jsonl"
    run_vllm(vllm_engine(FakeVllm()), source, tmp_path / "undisturbed.jsonl")
    api = FakeVllm(dies_at=frozenset({3, 25, 60}))
    told: list[str] = []
    engine = vllm_engine(api, arguments, notify=told.append)
    run_vllm(engine, source, target)
    assert check_rows(target, NUM_LINES) == {"answer": NUM_LINES}
    assert engine.num_restarts == 3
    assert len(api.opened) == 4
    assert "fell off the bus" in told[0]
    assert answers(target) == answers(tmp_path / "undisturbed.jsonl")


@WAYS
def test_the_request_that_kills_engines_is_found(tmp_path: Path, arguments: dict[str, Any]) -> None:
    source, target = mixed_job(tmp_path / "in.jsonl", NUM_LINES), tmp_path / "out.jsonl"
    engine = vllm_engine(FakeVllm(dies_of=frozenset({"17"})), arguments)
    run_vllm(engine, source, target)
    assert check_rows(target, NUM_LINES) == {"answer": NUM_LINES - 1, "engine_failure": 1}
    (row,) = read_rows(target.with_suffix(".errors.jsonl"))
    assert row["custom_id"] == "id-17"


@WAYS
@pytest.mark.parametrize("error", [ValueError("bad sample"), NotImplementedError(), RuntimeError("no kernel")])
def test_whatever_a_step_raises_is_a_death(
    tmp_path: Path, arguments: dict[str, Any], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what would be the fault of a request where one is handed in."""
    step = FakeEngine.step

    def breaking_step(engine: FakeEngine) -> Any:
        if any(request.external_id == "17" for request in engine.scheduler.running):
            raise error
        return step(engine)

    monkeypatch.setattr(FakeEngine, "step", breaking_step)
    source, target = mixed_job(tmp_path / "in.jsonl", NUM_LINES), tmp_path / "out.jsonl"
    run_vllm(vllm_engine(FakeVllm(), arguments), source, target)
    assert check_rows(target, NUM_LINES) == {"answer": NUM_LINES - 1, "engine_failure": 1}


@WAYS
def test_an_engine_that_takes_its_requests_down_runs_them_again(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """A signal makes vLLM's own process abort what runs before it goes."""
    source, target = mixed_job(tmp_path / "in.jsonl", NUM_LINES), tmp_path / "out.jsonl"
    engine = vllm_engine(FakeVllm(ends_at=frozenset({4})), arguments)
    run_vllm(engine, source, target)
    assert check_rows(target, NUM_LINES) == {"answer": NUM_LINES}
    assert engine.num_restarts == 1


def test_what_ends_an_engine_before_a_request_is_inside_is_a_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise FakeEngineDeadError("no such module")

    monkeypatch.setattr(FakeVllm, "sampling_params", fail)
    source = mixed_job(tmp_path / "in.jsonl", 3)
    with pytest.raises(ExecutorError, match=f"died 9 times.*limit is {MAX_DEATHS}; last: no such module"):
        run_vllm(vllm_engine(FakeVllm()), source, tmp_path / "out.jsonl")


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory, hf_0"), KeyError("layers"), ImportError()])
def test_an_engine_that_cannot_be_opened_is_an_error_of_ours(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(FakeVllm, "open_engine", fail)
    source, engine = mixed_job(tmp_path / "in.jsonl", 3), vllm_engine(FakeVllm(), {"hf_token": "hf_0"})
    with pytest.raises(ExecutorError, match=f"cannot open .*({str(error)[:7]}|ImportError).*--vllm-arg") as caught:
        run_vllm(engine, source, tmp_path / "out.jsonl")
    assert "hf_0" not in str(caught.value)


def test_an_engine_that_only_dies_ends_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    source, target = mixed_job(tmp_path / "in.jsonl", NUM_LINES), tmp_path / "out.jsonl"
    broken = FakeVllm(dies_at=frozenset(range(20, 10**4)))
    with pytest.raises(ExecutorError, match=f"limit is {MAX_DEATHS}.*run the same command again"):
        run_vllm(vllm_engine(broken), source, target)
    report = run_vllm(vllm_engine(FakeVllm()), source, target)
    kinds = check_rows(target, NUM_LINES)
    assert report.num_resumed > 0
    assert kinds["answer"] >= NUM_LINES - MAX_DEATHS // 2
    assert sum(kinds.values()) == NUM_LINES


def test_an_engine_that_cannot_be_opened_again_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = mixed_job(tmp_path / "in.jsonl", NUM_LINES)
    api = FakeVllm(dies_at=frozenset({3}))
    engine = vllm_engine(api)
    engine.open()

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeVllm, "open_engine", fail)
    with pytest.raises(ExecutorError, match=r"cannot be opened again: .*out of memory"):
        run_vllm(engine, source, tmp_path / "out.jsonl")


def test_closing_early_takes_requests_out_of_the_engine(tmp_path: Path) -> None:
    source = mixed_job(tmp_path / "in.jsonl", NUM_LINES)
    api = FakeVllm()
    engine = vllm_engine(api)

    with pytest.raises(StopError):
        run_vllm(engine, source, tmp_path / "out.jsonl", stop_after=10)
    assert engine.stats is not None
    assert engine.stats.num_finished >= 10
    assert api.engines[0].aborted
    assert not api.engines[0].scheduler.running
    assert api.engines[0].scheduler.num_free == api.num_blocks - 1


def test_what_lines_ask_beyond_text_reaches_the_engine(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,broken"}}
    lines = [
        chat("plain", "hello", max_tokens=3),
        chat("pirate", "hello", model="pirate", max_tokens=3),
        chat(
            "schema",
            "hello",
            max_tokens=3,
            response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
        ),
        line(
            "seen", messages=[{"role": "user", "content": [picture, {"type": "text", "text": "what?"}]}], max_tokens=3
        ),
        line("unseen", messages=[{"role": "user", "content": [broken]}], max_tokens=3),
        chat("any-name", "hello", model="gpt-4o", max_tokens=3, n=2, seed=5),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    api = FakeVllm()
    engine = vllm_engine(api)
    calls: dict[str, tuple[Any, Any, Any]] = {}
    engine.open()
    inside = engine.engine
    assert inside is not None
    add = inside.add_request

    def seen(request_id: str, prompt: Any, params: Any, lora_request: Any = None) -> Any:
        calls[request_id] = (prompt, params, lora_request)
        return add(request_id, prompt, params, lora_request)

    inside.add_request = seen
    run_vllm(engine, source, target)
    assert check_rows(target, 6) == {"answer": 5, "invalid_value": 1}
    by_id = {row["custom_id"]: row["response"]["body"] for row in read_rows(target)}
    assert by_id["pirate"]["model"] == "pirate"
    assert by_id["plain"]["model"] == "tiny"
    assert calls["1"][2].path == "/adapters/pirate"
    assert calls["0"][2] is None
    assert calls["2"][1].structure == {"json": schema}
    assert b"image_url" in bytes(calls["3"][0])  # the conversation itself went in, not the estimate of it
    assert [calls[index][1].seed for index in ("5", "6")] == [5, calls["6"][1].seed]
    assert calls["6"][1].seed != 5
    assert calls["0"][1].seed is None


def test_prompts_are_scored_and_a_token_that_nobody_asked_for_is_dropped(tmp_path: Path) -> None:
    lines = [
        line("read", "/v1/completions", prompt=[5, 6, 7], max_tokens=0, echo=True, logprobs=1),
        line("answered", "/v1/completions", prompt=[5, 6, 7], max_tokens=2, prompt_logprobs=0, ignore_eos=True),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    run_vllm(vllm_engine(FakeVllm()), source, target)
    by_id = {row["custom_id"]: row["response"]["body"] for row in read_rows(target)}
    read = by_id["read"]["choices"][0]
    assert read["logprobs"]["token_logprobs"] == [None, -6.0, -7.0]
    assert (read["finish_reason"], by_id["read"]["usage"]["completion_tokens"]) == ("length", 0)
    assert by_id["answered"]["usage"]["completion_tokens"] == 2
    scored = by_id["answered"]["choices"][0]["prompt_logprobs"]
    assert [None if entry is None else next(iter(entry.values()))["logprob"] for entry in scored] == [None, -6.0, -7.0]


def test_embeddings_are_rows_of_vectors(tmp_path: Path) -> None:
    lines = [
        line("one", "/v1/embeddings", input="hello"),
        line("many", "/v1/embeddings", input=["a", "bc"], encoding_format="base64"),
        line("short", "/v1/embeddings", input=[1, 2, 3], dimensions=2),
        chat("chat", "hello"),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    run_vllm(vllm_engine(FakeVllm(), embeds=True), source, target, served=EMBEDDER)
    by_id = {row["custom_id"]: row["response"]["body"] for row in read_rows(target)}
    assert by_id["short"]["data"] == [{"object": "embedding", "index": 0, "embedding": [0.0, 0.0]}]
    assert by_id["short"]["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [entry["index"] for entry in by_id["many"]["data"]] == [0, 1]
    assert by_id["many"]["data"][0]["embedding"] == "AACAPwAAgD8AAIA/AAAAQA=="
    assert len(by_id["one"]["data"][0]["embedding"]) == 4
    (row,) = read_rows(target.with_suffix(".errors.jsonl"))
    assert row["error"]["code"] == "invalid_url"


def test_an_embedding_that_is_no_number_is_an_error_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = FakeEngine.step

    def overflowing(engine: FakeEngine) -> Any:
        ended = step(engine)
        for output in ended:
            if len(output.prompt_token_ids) == 3:
                output.outputs.data = [1.0, float("nan")]
        return ended

    monkeypatch.setattr(FakeEngine, "step", overflowing)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(str(n), "/v1/embeddings", input=[5] * n) for n in (1, 3)))
    run_vllm(vllm_engine(FakeVllm(), embeds=True), source, target, served=EMBEDDER)
    assert [row["custom_id"] for row in read_rows(target)] == ["1"]
    (row,) = read_rows(target.with_suffix(".errors.jsonl"))
    assert "NaN" in row["response"]["body"]["error"]["message"]


def test_an_embedding_is_made_with_the_adapter_that_its_line_names(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(name, "/v1/embeddings", input="hello", model=name) for name in ("poet", "tiny")))
    engine = vllm_engine(FakeVllm(), embeds=True)
    engine.open()
    inside = engine.engine
    assert inside is not None
    add = inside.add_request
    adapters: list[str | None] = []

    def seen(request_id: str, prompt: Any, params: Any, lora_request: Any = None) -> Any:
        adapters.append(lora_request.path if lora_request else None)
        return add(request_id, prompt, params, lora_request)

    inside.add_request = seen
    able = replace(EMBEDDER, accepts_any_name=True, abilities=Abilities(adapters=("poet",), urls=(EMBEDDINGS_URL,)))
    run_vllm(engine, source, target, served=able)
    assert sorted(adapters, key=str) == ["/adapters/poet", None]
    assert {row["custom_id"]: row["response"]["body"]["model"] for row in read_rows(target)} == {
        "poet": "poet",
        "tiny": "tiny",
    }


def test_a_model_without_the_ability_refuses(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    seeing = line("a", messages=[{"role": "user", "content": [picture]}])
    source.write_text(seeing + "\n" + chat("b", "hello", max_tokens=2))
    plain = ServedModel(("tiny",), vocab_size=256, max_model_len=1024, abilities=Abilities())
    run_vllm(vllm_engine(FakeVllm()), source, target, served=plain)
    (row,) = read_rows(target.with_suffix(".errors.jsonl"))
    assert row["response"]["body"]["error"]["param"] == "messages[0].content[0]"
    assert json.loads(source.read_text().splitlines()[0])["custom_id"] == row["custom_id"]

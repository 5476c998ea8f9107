"""Sampling that a model's authors recommend: what is read, where it holds, and how it is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hostile_models import VALUES
from tiny_files import tiny_directory

from blendserve import LLM, SamplingParams
from blendserve.cli import main
from blendserve.dialect.defaults import checked_defaults, with_defaults
from blendserve.dialect.schema import ServedModel, parse_line
from blendserve.errors import ConfigError
from blendserve.job.batch_input import read_batch
from blendserve.models.generation_config import FROM_MODEL, NEUTRAL, sampling_defaults, shown_defaults
from blendserve.models.hub import ModelFiles
from blendserve.simulator.target import find_target, find_tokenizer, sampling_of

RECOMMENDED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}


def directory(path: Path, **generation: Any) -> Path:
    tiny_directory(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **generation}))
    return path


def defaults_of(tmp_path: Path, source: str = "auto", **generation: Any) -> dict[str, Any]:
    return sampling_defaults(ModelFiles("m", directory(tmp_path / "m", **generation)), source)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        (RECOMMENDED, RECOMMENDED),
        ({"max_new_tokens": 50}, {"max_tokens": 50}),
        ({"top_k": 50.0, "do_sample": False, "num_beams": 4, "max_length": 9}, {"top_k": 50}),
        ({"temperature": 1.0, "top_p": 1, "top_k": 0, "repetition_penalty": None}, {}),
        ({"temperature": 0.0}, {"temperature": 0.0}),
    ],
)
def test_what_is_read(generation: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert defaults_of(tmp_path, **generation) == expected


def test_sources(tmp_path: Path) -> None:
    assert defaults_of(tmp_path, "vllm", **RECOMMENDED) == {}
    other = directory(tmp_path / "other", temperature=0.2)
    assert defaults_of(tmp_path, str(other), **RECOMMENDED) == {"temperature": 0.2}
    with pytest.raises(ConfigError, match="--generation-config nowhere: there is no nowhere"):
        defaults_of(tmp_path, "nowhere")
    assert sampling_defaults(ModelFiles("m", tmp_path / "m.gguf")) == {}


@pytest.mark.parametrize("key", [*RECOMMENDED, "max_new_tokens"])
def test_any_value_is_taken_or_refused(key: str, tmp_path: Path) -> None:
    files = ModelFiles("m", directory(tmp_path / "m"))
    num_refused = 0
    for value in VALUES:
        (files.path / "generation_config.json").write_text(json.dumps({key: value}))
        try:
            checked_defaults(sampling_defaults(files))
        except ConfigError as error:
            num_refused += "--generation-config vllm" in str(error)
    assert num_refused > len(VALUES) // 2


@pytest.mark.parametrize(
    ("body", "is_completion", "expected"),
    [
        ({}, False, {"temperature": 0.6, "max_tokens": 50}),
        ({"temperature": 0, "max_tokens": None}, False, {"temperature": 0, "max_tokens": 50}),
        ({"temperature": None, "max_tokens": 70}, False, {"temperature": 0.6, "max_tokens": 70}),
        ({"max_completion_tokens": 70}, False, {"temperature": 0.6, "max_completion_tokens": 70}),
        ({"min_tokens": 60}, False, {"temperature": 0.6, "min_tokens": 60}),
        ({}, True, {"temperature": 0.6}),  # a completion has 16
    ],
)
def test_a_body_keeps_what_it_gives(body: dict[str, Any], is_completion: bool, expected: dict[str, Any]) -> None:
    assert with_defaults(body, {"temperature": 0.6, "max_tokens": 50}, is_completion=is_completion) == expected


def test_a_completion_is_cut_by_a_lower_limit() -> None:
    assert with_defaults({}, {"max_tokens": 5}, is_completion=True) == {"max_tokens": 5}


def test_lines_of_every_text_endpoint_get_them() -> None:
    served = ServedModel(("m",), default_sampling=RECOMMENDED)
    for url, prompt in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        line = {"custom_id": "a", "method": "POST", "url": url, "body": {**prompt, "top_p": 0.5}}
        sampling = parse_line(line, 1, served).sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.5, 20)


def test_what_extra_body_gives_counts() -> None:
    body = {"prompt": "x", "extra_body": {"top_k": 5}}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    sampling = parse_line(line, 1, ServedModel(("m",), default_sampling=RECOMMENDED)).sampling
    assert (sampling.top_k, sampling.top_p) == (5, 0.95)


def test_llm_uses_them_where_a_call_gives_no_parameters(tmp_path: Path) -> None:
    """As in vLLM: parameters that are given are taken as they are."""
    path = str(directory(tmp_path / "m", temperature=0.0, max_new_tokens=3))
    with LLM(path, kv_memory_bytes=1 << 22, num_threads=1) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=3)
        greedy = llm.generate(["the capital"], SamplingParams(temperature=0.0, max_tokens=3))
        (output,) = llm.generate(["the capital"])
        assert output.outputs[0].token_ids == greedy[0].outputs[0].token_ids
        assert next(llm.stream(["the capital"])).outputs[0].token_ids == greedy[0].outputs[0].token_ids
    with LLM(path, kv_memory_bytes=1 << 22, num_threads=1, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def answers(path: Path) -> list[str]:
    rows = map(json.loads, path.read_text().splitlines())
    return [row["response"]["body"]["choices"][0]["message"]["content"] for row in rows]


def run(model: Path, source: Path, output: Path, *options: str) -> int:
    limits = ["--kv-memory", "4MiB", "--max-num-seqs", "8", "--threads", "1"]
    return main(["run", str(source), "-o", str(output), "--model", str(model), *limits, *options])


def test_a_job_says_what_it_took_from_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = directory(tmp_path / "m", temperature=0.0)
    body = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 6, "seed": 3}
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {**body, **more}}
        for name, more in (("default", {}), ("greedy", {"temperature": 0}), ("hot", {"temperature": 2.0}))
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    assert run(model, source, tmp_path / "out.jsonl", "--ordered") == 0
    default, greedy, hot = answers(tmp_path / "out.jsonl")
    assert default == greedy != hot
    assert "gave temperature 0.0; --generation-config vllm leaves it out" in capsys.readouterr().out
    assert run(model, source, tmp_path / "plain.jsonl", "--ordered", "--generation-config", "vllm") == 0
    default, greedy, _ = answers(tmp_path / "plain.jsonl")
    assert default != greedy
    assert "leaves it out" not in capsys.readouterr().out


def test_another_source_is_another_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, source = directory(tmp_path / "m", temperature=0.5), tmp_path / "in.jsonl"
    body = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source.write_text(json.dumps(line))
    assert run(model, source, tmp_path / "out.jsonl") == 0
    assert run(model, source, tmp_path / "out.jsonl", "--generation-config", "vllm") == 1
    assert "generation config was temperature 0.5, is none" in capsys.readouterr().err


def test_shown_defaults() -> None:
    assert shown_defaults({}) == "none"
    assert shown_defaults({"top_p": 0.9, "max_tokens": 5}) == "max_tokens 5, top_p 0.9"


def test_a_plan_knows_the_models_limit(tmp_path: Path) -> None:
    model = str(directory(tmp_path / "m", max_new_tokens=7))
    source = tmp_path / "in.jsonl"
    body = {"messages": [{"role": "user", "content": "the"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source.write_text(json.dumps(line))
    target = find_target(model, notify=lambda _: None)
    tokenizer, _ = find_tokenizer(None, target, notify=lambda _: None)
    with read_batch(source, target.spec, tokenizer, default_sampling=sampling_of(target, FROM_MODEL)) as batch:
        assert batch.table.max_output_tokens.tolist() == [7]
    assert sampling_of(target, NEUTRAL) == {}


@pytest.mark.parametrize("command", ["check", "run", "plan"])
def test_every_command_reads_the_models_sampling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    model, source = directory(tmp_path / "m", top_p=7.5), tmp_path / "in.jsonl"
    body = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source.write_text(json.dumps(line))
    args = [command, str(source), "--model", str(model)]
    assert main(args) == 1
    assert "top_p" in capsys.readouterr().err
    assert main([*args, "--generation-config", "vllm"]) == 0

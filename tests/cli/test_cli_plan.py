"""`blendserve plan` on tiny files: its figures against a walk over the prompts, its page, its mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_cases import CALIBRATION
from oracles import shared_prefix
from report_pages import PageFacts
from tiny_files import tiny_directory

from blendserve.cli import main
from blendserve.config import BLOCK_SIZE
from blendserve.models.hub import ModelFiles
from blendserve.models.load import load_tokenizer

HOSTILE = "<script>alert(1)</script> & <b>"
SHARED = "the answer to the question is in the text that the user gave before "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLENDSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def line(custom_id: str, prompt: Any, **body: Any) -> str:
    content = {"model": "m", "prompt": prompt, "max_tokens": 6, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": content})


def prompts_of(count: int) -> list[str]:
    return [f"{SHARED}{HOSTILE} {index}" if index % 2 else f"{index} is none the same" for index in range(count)]


def write_job(path: Path, count: int = 12, *more: str) -> list[str]:
    prompts = prompts_of(count)
    lines = [line(f"r{index}", prompt, n=1 + index % 2) for index, prompt in enumerate(prompts)]
    path.write_text("\n".join([*lines, line("known", "who", max_tokens=20, ignore_eos=True), *more]))
    return [prompt for index, prompt in enumerate(prompts) for _ in range(1 + index % 2)] + ["who"]


def plan_args(source: Path, tiny: Path, *extra: str) -> list[str]:
    target = ["--model", "llama-3-8b", "--tokenizer", str(tiny)]
    return ["plan", str(source), *target, "--policy", "dfs,blend", *extra]


def test_figures_are_those_of_a_walk(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    texts = write_job(source, 12, "{nonsense")
    assert main(plan_args(source, tiny, "--json")) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    tokenizer = load_tokenizer(ModelFiles("tiny", tiny))
    prompts = [tuple(ids.tolist()) for ids in tokenizer.encode_batch(texts)]
    plan = report["plan"]
    num_tokens = sum(map(len, prompts))
    assert captured.err == ""
    assert report["num_lines"] == 14
    assert report["num_refused_by_code"] == {"invalid_json_line": 1}
    assert plan["num_requests"] == len(prompts)
    assert plan["num_distinct_prompts"] == len(set(prompts))
    assert plan["num_known_outputs"] == 1
    assert plan["prompt_tokens"] == num_tokens
    assert plan["prompts"]["greatest"] == max(map(len, prompts))
    num_shared = sum(shared_prefix(*pair) // BLOCK_SIZE * BLOCK_SIZE for pair in pairwise(sorted(set(prompts))))
    num_shared += num_tokens - sum(map(len, set(prompts)))  # repeated prompts
    assert plan["optimal_sharing"] == pytest.approx(num_shared / num_tokens)
    best = plan["prefixes"][0]
    assert best["text"].startswith("the answer to the question")
    assert best["num_requests"] == 12
    assert [row["policy"] for row in report["simulated"]["policies"]] == ["dfs", "blend"]
    for row in report["simulated"]["policies"]:
        assert 0 < row["share_of_bound"] <= 1
        assert row["time_s"] >= report["simulated"]["lower_bound_s"]


def test_text_says_what_is_simulated_and_assumed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    write_job(source)
    assert main(plan_args(source, tiny)) == 0
    printed = capsys.readouterr().out
    for expected in ("13 lines, all valid", "simulated, not measured", "on a100-80g with llama-3-8b", "density",
                     "compute end", "memory end", "shared prefixes", "assumed", "tokenizer of tiny"):  # fmt: skip
        assert expected in printed
    assert main(plan_args(source, tiny, "--output-tokens", "3")) == 0
    assert "taken as 3 tokens" in capsys.readouterr().out


def test_assumed_lengths_keep_caps_and_known_ones(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    texts = write_job(source)
    for assumed, expected in ((3, 3), (100, 6)):
        assert main(plan_args(source, tiny, "--json", "--output-tokens", str(assumed))) == 0
        plan = json.loads(capsys.readouterr().out)["plan"]
        assert plan["expected_output_tokens"] == 20 + expected * (len(texts) - 1)


def test_the_page_is_whole_and_loads_nothing(tiny: Path, tmp_path: Path) -> None:
    source, page = tmp_path / "in & out <i>.jsonl", tmp_path / "plan.html"
    write_job(source, 40)
    assert main(plan_args(source, tiny, "--html", str(page))) == 0
    facts = PageFacts.of(page.read_text())
    assert facts.problems == []
    assert facts.title == "Plan of in & out <i>.jsonl"
    assert "i" not in facts.tags
    assert "b" not in facts.tags
    assert any("<script>alert(1)" in text for text in facts.titles), "the icicle's tooltips show prompts as text"
    assert facts.tags.count("svg") == 1 + 2 + 1 + 2, "density, two timelines, icicle, two histograms"
    assert 0 < facts.max_points <= 1500
    assert "blend" in facts.text


@pytest.mark.parametrize("count", [0, 1])
def test_tiny_jobs_have_pages_too(count: int, tiny: Path, tmp_path: Path) -> None:
    source, page = tmp_path / "in.jsonl", tmp_path / "plan.html"
    write_job(source, count)
    assert main(plan_args(source, tiny, "--html", str(page))) == 0
    assert PageFacts.of(page.read_text()).problems == []


def test_large_jobs_are_simulated_in_part(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    texts = write_job(source, 60)
    assert main(plan_args(source, tiny, "--max-simulated", "32")) == 0
    assert f"of {len(texts)} requests on a machine made smaller" in capsys.readouterr().out


def test_outputs_that_never_come_are_null_in_json(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(line("a", "what", max_tokens=1))
    assert main(plan_args(source, tiny, "--json")) == 0
    printed = capsys.readouterr().out
    json.loads(printed, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def test_a_calibrated_machine_is_the_default(
    tiny: Path, tmp_path: Path, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(CALIBRATION, machine="two cores").save(empty_cache)
    source = tmp_path / "in.jsonl"
    write_job(source)
    assert main(["plan", str(source), "--model", str(tiny), "--policy", "dfs", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["hardware"], report["model"]) == ("two cores", "tiny")
    assert not any("tokenizer" in note for note in report["notes"])
    assert main(["plan", str(source), "--model", str(tiny), "--tensor-parallel", "2"]) == 1
    assert "one device" in capsys.readouterr().err


LONG = ["--policy", "dfs", "--json", "--max-simulated", "100"]
"""More than the lines of `write_long_job`: times are simulated and not scaled."""


def write_long_job(path: Path) -> None:
    """Decodes and prompts, so that every limit matters."""
    lines = [line(f"r{index}", f"{index} is none the same " * 4, max_tokens=60, ignore_eos=True) for index in range(24)]
    path.write_text("\n".join(lines))


def planned_s(capsys: pytest.CaptureFixture[str], source: Path, tiny: Path, *options: str) -> float:
    assert main(["plan", str(source), "--model", str(tiny), *LONG, *options]) == 0
    (run,) = json.loads(capsys.readouterr().out)["simulated"]["policies"]
    return float(run["time_s"])


@pytest.mark.parametrize(
    "options",
    [
        ["--kv-memory", "64KiB"],
        ["--max-num-seqs", "2"],
        ["--max-num-seqs", "8", "--max-num-batched-tokens", "8"],
        ["--overlap", "off"],
        ["--dtype", "int8"],
    ],
)
def test_a_plan_is_of_the_run_that_its_options_describe(
    options: list[str], tiny: Path, tmp_path: Path, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each limit and each loss of overlap takes longer; int8 is calibrated as faster."""
    bf16 = replace(CALIBRATION, compute_delay=0.0, memory_delay=0.0, layer_constant_s=0.0, loop_s=0.0, step_points=())
    bf16.save(empty_cache)
    replace(bf16, dtype="int8", gemm_flop_per_s=9e11, weight_bytes_per_s=9e10, kv_bytes_per_s=9e10).save(empty_cache)
    source = tmp_path / "in.jsonl"
    write_long_job(source)
    usual = planned_s(capsys, source, tiny, "--threads", "2")
    changed = planned_s(capsys, source, tiny, *options)
    assert (changed < 0.99 * usual) if "int8" in options else (changed > 1.01 * usual)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "calibrate --dtype int8"),
        (["--threads", "3"], "calibrate --threads 3"),
        (["--kv-memory", "1"], "raise --kv-memory"),
        (["--kv-memory", "1MiB", "--hardware", "h100"], "--kv-memory describes a run on this machine"),
        (["--max-num-seqs", "9999"], "below --max-num-seqs 9999"),
    ],
)
def test_runs_that_cannot_be_planned_are_one_line(
    options: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    empty_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    CALIBRATION.save(empty_cache)
    write_job(tmp_path / "in.jsonl")
    assert main(["plan", str(tmp_path / "in.jsonl"), "--model", str(tiny), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_models_own_weights_are_not_needed(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((tiny / name).read_bytes())
    source = tmp_path / "in.jsonl"
    write_job(source)
    assert main(["plan", str(source), "--model", str(bare), "--policy", "dfs"]) == 0
    assert "with bare" in capsys.readouterr().out


def test_no_weights_are_fetched_from_the_hub(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def snapshot_download(_: str, *, revision: str | None, allow_patterns: list[str], **__: Any) -> str:
        assert revision is None
        asked.extend(allow_patterns)
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = tmp_path / "in.jsonl"
    write_job(source)
    assert main(["plan", str(source), "--model", "owner/name", "--policy", "dfs"]) == 0
    assert "with owner/name" in capsys.readouterr().out
    assert asked == ["*.json", "*.jinja"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--hardware", "this-machine"], "blendserve calibrate"),
        (["--model", "no-such-model"], "llama-3-8b"),
        (["--model", "missing.json"], "no file missing.json"),
        (["--model", "llama-3-70b"], "--tensor-parallel"),
        (["--html", "no/such/page.html"], "no directory"),
        (["--html", "."], "directory"),
        (["--tokenizer", "./nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    extra: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path / "in.jsonl")
    assert main(plan_args(Path("in.jsonl"), tiny, *extra)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("blendserve: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("{bad", "holds no line that can be answered (invalid_json_line 1)")]
)
def test_a_file_without_requests(
    text: str, message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    assert main(plan_args(source, tiny)) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("extra", [["--policy", "magic"], ["--max-simulated", "0"], ["--hardware", "abacus"]])
def test_wrong_usage_exits_2(extra: list[str], tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(plan_args(tmp_path / "in.jsonl", tiny, *extra))
    assert end.value.code == 2


def test_nothing_is_left_behind(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    source = tmp_path / "in.jsonl"
    write_job(source)
    assert main(plan_args(source, tiny)) == 0
    assert list(scratch.iterdir()) == []
    assert np.array_equal(sorted(path.name for path in tmp_path.glob("in*")), ["in.jsonl"])


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--hardware", "--model", "--policy", "--html", "--json", "llama-3-8b", "a100-80g"):
        assert option in printed

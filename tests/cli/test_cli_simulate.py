"""`blendserve simulate` on small jobs: costs that follow from time, its page, its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_pages import PageFacts
from tiny_files import hf_config, tiny_directory
from tiny_models import tiny_spec

from blendserve.cli import main

BLEND = ["--blend", "1.4,0.35", "--requests", "20000", "--max-simulated", "400"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLENDSERVE_CACHE", str(tmp_path / "cache"))


def write_job(path: Path, count: int = 20) -> None:
    def line(index: int) -> str:
        body = {"prompt": f"what is the answer to the question {index}", "max_tokens": 8 + index}
        return json.dumps({"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body})

    path.write_text("\n".join(map(line, range(count))))


def test_costs_follow_from_time(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    write_job(source)
    costs = ["--price", "2.5", "--watts", "300", "--replicas", "2", "--tensor-parallel", "2"]
    args = ["simulate", str(source), "--tokenizer", str(tiny), "--policy", "dfs,blend", "--json", *costs]
    assert main(args) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    assert (report["hardware"], report["model"]) == ("a100-80g", "llama-3-8b")
    assert [(run["policy"], run["engine"]) for run in report["runs"]] == [
        ("dfs", "overlapped"),
        ("blend", "overlapped"),
        ("dfs", "sequential"),
        ("blend", "sequential"),
    ]
    for run in report["runs"]:
        assert run["gpu_hours"] == pytest.approx(4 * run["time_s"] / 3600)
        assert run["price"] == pytest.approx(2.5 * run["gpu_hours"])
        assert run["energy_kwh"] == pytest.approx(0.3 * run["gpu_hours"])
        num_tokens = report["num_prompt_tokens"] + report["num_output_tokens"]
        assert run["tokens_per_s"] == pytest.approx(num_tokens / run["time_s"])
        assert 0 < run["share_of_bound"] <= 1


def test_a_blend_is_simulated_at_a_smaller_scale(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *BLEND, "--engine", "overlapped", "--policy", "dfs,blend", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_requests"] == 20_000
    assert report["num_simulated"] < 1000
    assert report["optimal_sharing"] == pytest.approx(0.35, rel=0.03)
    dfs, blend = report["runs"]
    assert blend["time_s"] < dfs["time_s"]
    assert blend["time_s"] > report["lower_bound_s"]
    assert dfs["price"] is None


def test_text_names_what_is_synthetic_and_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["simulate", *BLEND, "--compute-trace", "azure", "--policy", "dfs", "--engine", "sequential"]
    assert main([*args, "--hardware", "h100"]) == 0
    captured = capsys.readouterr()
    for expected in ("simulated, not measured", "synthetic", "h100 with llama-3-8b", "sequential", "upper estimate",
                     "assumed to reach the same"):  # fmt: skip
        assert expected in captured.out
    assert "price" not in captured.out
    assert "GPU-hours" in captured.out
    assert "simulating dfs" in captured.err


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    args = ["simulate", *BLEND, "--policy", "dfs,blend", "--engine", "overlapped", "--price", "2"]
    assert main([*args, "--html", str(page)]) == 0
    facts = PageFacts.of(page.read_text())
    assert facts.problems == []
    assert facts.tags.count("svg") == 6
    assert facts.tags.count("tr") == 3
    assert 0 < facts.max_points <= 1500
    assert "at the given rate" in facts.text


def test_a_shape_from_a_config_file(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "my-model" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(hf_config(tiny_spec("llama", hidden_size=2048, num_layers=24, max_position=4096))))
    source = tmp_path / "in.jsonl"
    write_job(source)
    args = ["simulate", str(source), "--model", str(config), "--tokenizer", str(tiny), "--policy", "dfs"]
    assert main([*args, "--engine", "overlapped"]) == 0
    assert "a100-80g with my-model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "neither of IN.jsonl and --blend"),
        (["in.jsonl", "--blend", "1,0.1"], "both of IN.jsonl and --blend"),
        (["missing.jsonl", "--tokenizer", "TINY"], "missing.jsonl"),
        (["--blend", "5000,0.9"], "negative counts"),
        (["--blend", "1.1,0.25", "--hardware", "l4", "--model", "qwen-2.5-72b"], "--tensor-parallel"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *(str(tiny) if arg == "TINY" else arg for arg in args)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("blendserve: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "extra",
    [["--blend", "1.4"], ["--blend", "1,2"], ["--blend", "-1,0"], ["--price", "-1"], ["--price", "nan"],
     ["--engine", "steam"], ["--replicas", "0"], ["--watts", "much"]],
)  # fmt: skip
def test_wrong_usage_exits_2(extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["simulate", *extra])
    assert end.value.code == 2
    assert extra[0] in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["simulate", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--hardware", "--model", "--policy", "--html", "--json", "llama-3-8b", "a100-80g"):
        assert option in printed

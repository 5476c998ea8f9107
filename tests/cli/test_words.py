"""How the command speaks: one line, options by their names, and no page of usage before an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_files import tiny_directory

from blendserve.cli import main
from blendserve.cli.words import OPTION_BY_SETTING, in_option_words


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


def line(**body: Any) -> str:
    content = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **body}
    return json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": content})


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run"], "the following arguments are required: IN.jsonl; see blendserve run --help"),
        (["run", "in.jsonl", "--threads", "0"], "--threads: '0' is not a whole number from 1 up"),
        (["run", "in.jsonl", "--max-num-seqs", "x"], "--max-num-seqs: 'x' is not a whole number"),
        (["run", "in.jsonl", "--engin", "x"], "--engine: invalid choice: 'x'"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "required: COMMAND; see blendserve --help"),
    ],
)
def test_a_mistyped_command_is_one_line(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("blendserve: ")
    assert words in error
    assert error.count("\n") == 1


def test_settings_are_named_by_their_options(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(line())
    command = ["run", str(source), "--model", str(tiny)]
    for options, words in (
        (
            ["--max-num-seqs", "9", "--max-num-batched-tokens", "8"],
            "--max-num-batched-tokens is 8, below --max-num-seqs 9",
        ),
        (["--max-model-len", "100000"], "--max-model-len is 100000, but tiny was made for 512 tokens"),
        (["--threads", "100000"], "--threads is 100000, but this machine has"),
    ):
        assert main([*command, *options]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert not any(name in error for name in OPTION_BY_SETTING)


def test_words_that_are_no_settings_stay() -> None:
    for text in ("max_tokens is 3", "'num_threads' in the line", "vllm_config.max_model_len", "--kv-tokens 3"):
        assert in_option_words(text) == text
    assert in_option_words("num_cpus is -1; it must be at least 0, or None to leave it open") == (
        "--replica-cpus is -1; it must be at least 0, or leave it out"
    )


def test_check_by_the_rules_of_every_engine(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    picture = [{"type": "input_audio", "input_audio": {}}]
    source.write_text(
        line(messages=[{"role": "user", "content": picture}]).replace('"a"', '"sound"', 1)
        + "\n"
        + line(model="poet").replace('"a"', '"poet"', 1)
        + "\n"
        + line(stream=True).replace('"a"', '"stream"', 1)
    )

    def check(*options: str) -> dict[str, list[int]]:
        code = main(["check", str(source), "--json", *options])
        report = json.loads(capsys.readouterr().out)
        assert code == (1 if report["errors"] else 0)
        return {code: found["line_numbers"] for code, found in report["errors"].items()}

    model = ["--model", str(tiny)]
    assert check(*model) == {"unsupported_parameter": [1, 3]}
    assert check(*model, "--engine", "vllm") == {"unsupported_parameter": [1, 3]}
    assert check("--engine", "http") == {"unsupported_parameter": [3]}
    assert check(*model, "--engine", "vllm", "--task", "embed") == {"invalid_url": [1, 2, 3]}
    assert main(["check", str(source), "--engine", "http"]) == 1
    assert capsys.readouterr().out.startswith("3 lines, 2 valid: 2 requests\n"), "tokens are not known"
    assert main(["check", str(source), "--engine", "vllm"]) == 1
    assert "--engine vllm needs --model" in capsys.readouterr().err
    assert main(["check", str(source), "--task", "embed"]) == 1
    assert "add --engine vllm" in capsys.readouterr().err


def test_counts_agree_with_their_nouns(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(line())
    assert main(["check", str(source), "--model", str(tiny)]) == 0
    assert capsys.readouterr().out.startswith("1 line, 1 valid: 1 request, ")
    assert main(["run", str(source), "--model", str(tiny), "--quiet", "--kv-memory", "4MiB"]) == 0
    assert capsys.readouterr().out.startswith("1 answer in ")


def test_a_plan_says_which_hardware_it_assumes(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLENDSERVE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "in.jsonl"
    source.write_text(line())
    assert main(["plan", str(source), "--model", str(tiny), "--policy", "dfs", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["hardware"] == "a100-80g"
    assert "the times are of a100-80g, not of this machine" in report["notes"][0]
    assert main(["plan", str(source), "--model", str(tiny), "--policy", "dfs", "--hardware", "a100-80g", "--json"]) == 0
    assert not any("this machine" in note for note in json.loads(capsys.readouterr().out)["notes"])

"""Which options belong to which engine."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from blendserve.cli import main
from blendserve.cli.engine_options import ENGINE_NAMES, ENGINES_BY_OPTION, add_engine, add_engine_choice
from blendserve.cli.options import add_chat

OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("native",): (
        "--window=5",
        "--report=r.html",
        "--trace=t.json",
        "--dtype=int8",
        "--kv-dtype=int8",
        "--isa=portable",
        "--overlap=off",
    ),
    ("native", "vllm"): (
        "--revision=v2",
        "--generation-config=vllm",
        "--max-model-len=64",
        "--kv-memory=1GiB",
        "--max-num-seqs=9",
        "--max-num-batched-tokens=99",
        "--threads=1",
        "--no-prefix-caching",
        "--chat-template=t.jinja",
        '--chat-template-kwargs={"enable_thinking": false}',
        "--template-date=2026-01-02",
        "--tool-format=hermes",
        "--reasoning-format=none",
        "--control-tokens=obey",
    ),
    ("http",): (
        "--base-url=http://localhost:1",
        "--header=a=b",
        "--max-inflight=9",
        "--kv-tokens=9",
        "--request-timeout=9",
        "--max-attempts=9",
        "--max-outage=9",
        "--tokenizer=m",
    ),
    ("vllm",): (
        "--task=embed",
        "--lora=a=b",
        "--vllm-scheduler=blend",
        "--own-process",
        "--image-domain=a.example",
        "--vllm-arg=a=1",
    ),
}
"""One value other than the default of every option that not all engines look at."""


@pytest.mark.parametrize(
    ("engine", "option"),
    [
        (engine, option)
        for looking, options in OPTIONS.items()
        for option in options
        for engine in ENGINE_NAMES
        if engine not in looking
    ],
)
def test_options_that_an_engine_would_not_look_at_are_refused(
    engine: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert main(["run", *files, "--engine", engine, option]) == 1
    assert re.search(f"{option.split('=')[0]} is an option of .*the {engine} engine ignores", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_every_option_of_one_engine_is_known_as_such() -> None:
    """What --help groups under an engine, and what is common to all."""
    listed = {option.split("=")[0] for options in OPTIONS.values() for option in options}
    assert {f"--{name.replace('_', '-')}" for name in ENGINES_BY_OPTION} == listed
    parser = argparse.ArgumentParser()
    add_chat(parser)
    add_engine(parser)
    add_engine_choice(parser)
    given = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    assert given - listed == {"--help", "--engine"}

"""--revision: which commit of a hub model answers is the user's choice, and no secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_files import tiny_directory

from blendserve.cli import main

LIMITS = ["--kv-memory", "4MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--threads", "2", "--quiet"]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """A hub of one repository, in which every revision is a commit of its name, but for the branch "moving", which has
    another one every time. Returns: the revisions asked for.
    """
    import huggingface_hub

    revisions: list[str | None] = []

    def snapshot_download(repository: str, *, revision: str | None, **_: Any) -> str:
        revisions.append(revision)
        commit = f"commit{len(revisions)}" if revision == "moving" else revision or "newest"
        return str(tiny_directory(tmp_path / repository / "snapshots" / commit))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return revisions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "the", "max_tokens": 1}}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    return tmp_path / "in.jsonl"


def test_the_revision_is_in_the_summary_and_in_the_identity(
    tmp_path: Path, source: Path, asked: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", "owner/name", *LIMITS]
    assert main([*command, "--revision", "c0ffee"]) == 0
    assert asked == ["c0ffee"]
    assert "Model owner/name is revision c0ffee." in capsys.readouterr().out
    assert main([*command, "--revision", "decaf"]) == 1
    assert "belongs to another job" in capsys.readouterr().err
    assert main([*command, "--fresh"]) == 0
    assert "is revision newest." in capsys.readouterr().out


@pytest.mark.usefixtures("asked")
def test_a_branch_that_has_moved_is_another_model(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", "owner/name", *LIMITS]
    assert main([*command, "--revision", "moving"]) == 0
    assert main([*command, "--revision", "moving"]) == 1
    assert "revision commit1, is owner/name@moving" in capsys.readouterr().err


@pytest.mark.parametrize("model", [[], ["--model", "owner/name@v2"], ["--model", "SmolLM2-135M-Instruct"]])
def test_a_revision_of_what_has_none_is_refused(
    tmp_path: Path, source: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(source), "-o", str(tmp_path / "out.jsonl"), *model, *LIMITS]
    assert main([*command, "--revision", "c0ffee"]) == 1
    assert "--revision c0ffee is for a model of the Hugging Face hub" in capsys.readouterr().err

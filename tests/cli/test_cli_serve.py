"""Options of `serve`, from the command line to the settings of its engines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from serve_process import free_port
from tiny_files import tiny_directory

from blendserve import HttpSettings, NativeSettings, VllmSettings
from blendserve.cli import _parser, main
from blendserve.cli.serve import serve_settings
from blendserve.serve.settings import ServeSettings


def settings_of(data: Path, *options: str) -> ServeSettings:
    return serve_settings(_parser("serve").parse_args(["serve", "--data", str(data), *options]))


def test_the_default_model_has_its_name(tmp_path: Path) -> None:
    (model,) = settings_of(tmp_path).models
    assert model.name == "SmolLM2-135M-Instruct"
    assert isinstance(model.engine, NativeSettings)
    assert model.engine.model is None


def test_models_are_called_by_their_last_part_or_by_a_name(tmp_path: Path) -> None:
    path = tiny_directory(tmp_path / "tiny")
    options = ("--model", str(path), "--model", f"big={path}", "--model", "owner/name", "--kv-memory", "1GiB")
    models = settings_of(tmp_path, *options).models
    assert [model.name for model in models] == ["tiny", "big", "owner/name"]
    assert models[0].aliases == (str(path),)
    for model in models:
        assert isinstance(model.engine, NativeSettings)
        assert model.engine.kv_memory_bytes == 1 << 30
    assert settings_of(tmp_path, *options).model_named("big") == models[1]
    assert settings_of(tmp_path, *options).model_named("none") is None
    assert settings_of(tmp_path, *options).model_named(None) is None


def test_every_engine_can_be_chosen(tmp_path: Path) -> None:
    (vllm,) = settings_of(tmp_path, "--engine", "vllm", "--model", "owner/name").models
    assert isinstance(vllm.engine, VllmSettings)
    (http,) = settings_of(tmp_path, "--engine", "http", "--base-url", "http://localhost:1/v1").models
    assert isinstance(http.engine, HttpSettings)
    assert http.accepts_any_name
    assert settings_of(tmp_path, "--engine", "http", "--base-url", "http://localhost:1/v1").model_named("x") == http


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "a=b/x", "--model", "a=b/y"), "two models are called a"),
        (("--model", "no-such-model"), "no model 'no-such-model'"),
        (("--model", "a=b/x", "--model", "c=./none"), "no model './none'"),
        (("--model", "=x"), "is not understood"),
        (("--engine", "http"), "needs the server's address"),
        (("--engine", "http", "--base-url", "http://localhost:1/v1", "--dtype", "int8"), "--dtype is an option of"),
        (("--tls-cert", "cert.pem"), "needs both"),
        (("--webhook", "ftp://x"), "--webhook is"),
        (("--host", "0.0.0.0"), "blendserve keys add"),
    ],
)
def test_what_cannot_be_served(
    tmp_path: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra [serve]")
    assert main(["serve", "--data", str(tmp_path / "data"), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_opened_ends_the_service_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra [serve]")
    path = tiny_directory(tmp_path / "tiny")
    (path / "config.json").write_text("{}")
    assert main(["serve", "--data", str(tmp_path / "data"), "--port", str(free_port()), "--model", str(path)]) == 1
    assert "cannot open the model tiny: " in capsys.readouterr().err


def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "blendserve.serve.server", raising=False)
    assert main(["serve", "--data", str(tmp_path)]) == 1
    assert "pip install 'blendserve[serve]'" in capsys.readouterr().err


def test_help_loads_nothing_of_the_service() -> None:
    code = (
        "import sys; from blendserve.cli import _parser; _parser(); "
        "print([name for name in sys.modules if name.split('.')[0] in ('starlette', 'uvicorn', 'httpx2')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

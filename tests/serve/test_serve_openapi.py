"""The OpenAPI document: it names every route, and nothing that it allows or forbids is a server error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import settings_for
from serve_process import service_process

from blendserve.engines.http.fake_server import FakeSettings, serving
from blendserve.serve.app import make_app
from blendserve.serve.openapi import document
from blendserve.serve.service import Service

NO_SERVER = "http://127.0.0.1:9/v1"


def test_the_document_names_every_route_of_the_api(tmp_path: Path) -> None:
    app = make_app(Service(settings_for(tmp_path / "data", NO_SERVER)))
    routes = {
        (route.path.replace("{id:path}", "{id}"), method.lower())  # type: ignore[attr-defined]
        for route in app.routes
        if route.path.startswith("/v1/")  # type: ignore[attr-defined]
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    named = {(path, method) for path, methods in document()["paths"].items() for method in methods}
    assert routes - named == {("/v1/models/{id}", "get")}
    app.state.service.close()


def run_schemathesis(url: str, num_examples: int) -> None:
    pytest.importorskip("schemathesis", reason="needs schemathesis")
    options = ("--checks", "not_a_server_error", "-n", str(num_examples), "--seed", "1", "--phases", "fuzzing")
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.thorough
def test_nothing_that_the_document_allows_or_forbids_is_a_server_error(tmp_path: Path) -> None:
    with serving(FakeSettings()) as server, service_process(tmp_path / "data", server.base_url) as service:
        run_schemathesis(service.url, 100)

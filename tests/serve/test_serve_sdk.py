"""The official `openai` client, unmodified, and our own commands, against a service of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
pytest.importorskip("openai", reason="needs the openai package")
import openai
from serve_cases import lines, wait_until
from serve_process import ServiceProcess, service_process

from blendserve.engines.http.fake_server import FakeSettings, serving


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    data = tmp_path_factory.mktemp("sdk") / "data"
    with serving(FakeSettings()) as server, service_process(data, server.base_url) as found:
        yield found


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as found:
        yield found


def test_files_and_batches_from_beginning_to_end(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", lines(30)), purpose="batch")
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.retrieve(file.id).filename == "in.jsonl"
    assert client.files.content(file.id).content == lines(30)
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"name": "one"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
    done = client.batches.retrieve(batch.id)
    assert done.request_counts is not None
    assert done.request_counts.completed == 30
    assert done.metadata == {"name": "one"}
    assert done.usage is not None
    assert done.usage.output_tokens > 0
    assert done.output_file_id is not None
    rows = client.files.content(done.output_file_id).text.splitlines()
    assert [json.loads(row)["custom_id"] for row in rows] == [f"id-{number}" for number in range(30)]
    output = client.files.retrieve(done.output_file_id)
    assert output.expires_at == output.created_at + 3600
    assert batch.id in [found.id for found in client.batches.list(limit=1)]
    assert file.id in [found.id for found in client.files.list(purpose="batch")]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_uploads_in_chunks(client: openai.OpenAI, tmp_path: Path) -> None:
    data, path = lines(200), tmp_path / "big.jsonl"
    path.write_bytes(data)
    done = client.uploads.upload_file_chunked(
        file=path,
        mime_type="application/jsonl",
        purpose="batch",
        part_size=4096,
    )
    assert done.file is not None
    assert client.files.content(done.file.id).content == data
    begun = client.uploads.create(bytes=5, filename="a", mime_type="text/plain", purpose="batch")
    assert client.uploads.cancel(begun.id).status == "cancelled"


def test_a_batch_can_be_cancelled(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", lines(3000)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert client.batches.cancel(batch.id).status == "cancelling"
    wait_until(lambda: client.batches.retrieve(batch.id).status == "cancelled")


def test_errors_are_those_of_the_sdk(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.batches.retrieve("batch_none")
    assert missing.value.code == "not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.batches.create(input_file_id="x", endpoint="/v1/nothing", completion_window="24h")  # type: ignore[arg-type]
    assert bad.value.param == "endpoint"
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("a", b"x"), purpose="fine-tune")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m"]
    assert client.models.retrieve("m").owned_by == "blendserve"


def command(service: ServiceProcess, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    base_url = f"{service.url}/v1"
    return subprocess.run(
        [sys.executable, "-m", "blendserve", *words, "--base-url", base_url],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_submit_waits_and_fetches(service: ServiceProcess, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines(12))
    done = command(service, "submit", str(source), "--wait", "-o", str(output), "--poll", "0.1", "--metadata", "a=b")
    assert done.returncode == 0, done.stderr
    assert len(output.read_text().splitlines()) == 12
    assert not list(tmp_path.glob("*.partial"))
    listed = command(service, "batches", "--limit", "1")
    assert "completed" in listed.stdout
    id = listed.stdout.split()[0]
    again = tmp_path / "again.jsonl"
    assert command(service, "batches", id, "-o", str(again)).returncode == 0
    assert again.read_bytes() == output.read_bytes()
    refused = command(service, "cancel", id)
    assert (refused.returncode, "only a batch that runs" in refused.stderr) == (1, True)


def test_submit_says_why_a_file_makes_no_batch(service: ServiceProcess, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines(1) * 2)
    failed = command(service, "submit", str(source), "--wait", "--poll", "0.1")
    assert failed.returncode == 1
    assert "line 2: custom_id" in failed.stderr
    nowhere = command(service, "submit", str(tmp_path / "none.jsonl"))
    assert (nowhere.returncode, "cannot read" in nowhere.stderr) == (1, True)


RECIPES = Path(__file__).parent.parent.parent / "docs" / "quickstart-serve.md"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_recipes_for_curl_work(service: ServiceProcess, tmp_path: Path) -> None:
    shown = RECIPES.read_text().partition("<!-- curl recipes: tests run these lines -->")[2]
    commands = shown.partition("```sh\n")[2].partition("```")[0].splitlines()
    assert len(commands) == 6
    (tmp_path / "in.jsonl").write_bytes(lines(3))
    variables = {"URL": f"{service.url}/v1", "PATH": os.environ["PATH"]}

    def run(text: str) -> str:
        done = subprocess.run(
            ["sh", "-c", text], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
        )
        return done.stdout

    variables["FILE"] = json.loads(run(commands[0]))["id"]
    variables["BATCH"] = json.loads(run(commands[1]))["id"]
    wait_until(lambda: json.loads(run(commands[2]))["status"] == "completed")
    output_file = json.loads(run(commands[2]))["output_file_id"]
    assert "id-0" in run(commands[3])
    assert output_file
    assert len(json.loads(run(commands[4]))["data"]) <= 5
    assert json.loads(run(commands[5]))["deleted"]

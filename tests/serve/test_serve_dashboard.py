"""The dashboard: read and used without JavaScript, and in a browser where one is installed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import create, line, lines, running, settings_for, upload, wait_for
from serve_process import service_process
from serve_sockets import exchange, listening
from starlette.testclient import TestClient

from blendserve.engines.http.fake_server import FakeSettings, serving
from blendserve.serve.dashboard import _STATIC
from blendserve.serve.keys import KeyFile
from blendserve.serve.service import Service

if TYPE_CHECKING:
    from playwright.sync_api import Page

HTML = {"Accept": "text/html"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with running(tmp_path_factory.mktemp("dashboard") / "data") as found:
        yield found


def page_of(client: TestClient, path: str, status_code: int = 200, **fields: Any) -> str:
    reply = client.get(path, headers=HTML, **fields)
    assert reply.status_code == status_code, reply.text
    assert reply.headers["content-type"].startswith("text/html")
    return reply.text


def test_an_empty_service_says_what_to_do(tmp_path: Path) -> None:
    with running(tmp_path / "data") as client:
        assert "blendserve submit in.jsonl" in page_of(client, "/")
        assert "There are no files yet" in page_of(client, "/files")
        assert "blendserve keys add" in page_of(client, "/keys")


def test_a_file_becomes_a_batch_by_forms_alone(client: TestClient) -> None:
    bad = json.dumps(line("<script>bad</script>", body={"stream": True})).encode()
    sent = client.post("/files", files={"file": ("<b>x</b>.jsonl", lines(12) + bad)}, data={"purpose": "batch"})
    assert sent.status_code == 200
    assert "&lt;b&gt;x&lt;/b&gt;.jsonl" in sent.text or "b&gt;.jsonl" in sent.text
    file_id = re.search(r'name="input_file_id" value="(file_\w+)"', sent.text)
    assert file_id is not None
    form = {"input_file_id": file_id[1], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch_page = client.post("/batches", data=form)
    id = batch_page.url.path.rpartition("/")[2]
    wait_for(client, id)
    shown = page_of(client, f"/batch/{id}")
    assert "13 of 13 done, 1 failed" in shown
    assert "what is id-3?" in shown
    assert "unsupported_parameter" in shown
    assert "<script>bad" not in shown
    assert f'href="/batch/{id}?from=10"' in shown
    assert "&lt;script&gt;bad" in page_of(client, f"/batch/{id}?from=10")
    assert id in page_of(client, "/")
    client.post(f"/batch/{id}/delete")
    assert "No such Batch" in page_of(client, f"/batch/{id}", 404)


def test_a_failed_batch_shows_its_errors(client: TestClient) -> None:
    done = wait_for(client, create(client, upload(client, b"{oops\n"))["id"])
    assert "Line 1: the line is not valid JSON" in page_of(client, f"/batch/{done['id']}")


@pytest.mark.parametrize("path", ["/", "/files", "/keys"])
def test_pages_load_nothing_from_elsewhere(client: TestClient, path: str) -> None:
    reply = client.get(path)
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    links = re.findall(r'(?:src|href|action)="([^"]*)"', reply.text)
    assert links
    assert all(link.startswith(("/", "#", "data:,")) and not link.startswith("//") for link in links)
    assert re.search(r"<script(?! src=)|\son\w+=", reply.text) is None


def test_static_files_are_a_fixed_list(client: TestClient) -> None:
    for name in _STATIC:
        assert client.get(f"/static/{name}").status_code == 200
    for name in ("../service.py", "x", "..%2fapp.py"):
        assert client.get(f"/static/{name}").status_code == 404


def test_a_key_opens_a_session_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    alice, bob = (KeyFile(tmp_path / "data").add(name)[1] for name in ("alice", "bob"))
    with running(tmp_path / "data") as client:
        assert "Log in" in page_of(client, "/")
        assert client.post("/login", data={"key": "bsk-wrong"}).status_code == 401
        other = {"Authorization": f"Bearer {bob}"}
        upload(client, lines(1), "of-bob.jsonl", headers=other)
        reply = client.post("/login", data={"key": alice}, follow_redirects=False)
        cookie = reply.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert alice.lower() not in cookie
        upload(client, lines(1), "of-alice.jsonl")  # the session is enough
        shown = page_of(client, "/files")
        assert "of-alice.jsonl" in shown
        assert "of-bob.jsonl" not in shown
        crossed = client.post("/logout", headers={"Origin": "https://evil.example"})
        assert crossed.status_code == 403
        KeyFile(tmp_path / "data").revoke("alice")
        assert "Log in" in page_of(client, "/files")


def test_lines_without_a_name_are_all_shown(client: TestClient) -> None:
    batch = create(client, upload(client, b"{nope\n" * 3), metadata={"project": "long " * 90})
    wait_for(client, batch["id"], "failed")
    shown = page_of(client, f"/batch/{batch['id']}")
    assert re.findall(r"<h3>(Line \d)</h3>", shown) == ["Line 1", "Line 2", "Line 3"]
    assert shown.count("No answer.") == 3
    assert "<dt>project</dt><dd>long long" in shown


def test_a_page_that_just_connected_is_told_to_look_again(tmp_path: Path) -> None:
    with listening(Service(settings_for(tmp_path / "data", "http://127.0.0.1:9/v1"))) as port:
        for _ in range(3):  # by the third the service has done nothing for long
            told = exchange(port, b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n", 1.0, end=b"\n\n\r\n")
            assert told.endswith(b"event: changed\ndata: .\n\n\r\n")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """A page of a browser on a slow service."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with (
        serving(FakeSettings(latency_s=0.15)) as server,
        service_process(tmp_path / "data", server.base_url, "--max-inflight", "4") as service,
        playwright.sync_playwright() as found,
    ):
        browser = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(base_url=service.url, accept_downloads=True)
        context.set_default_timeout(60_000)
        yield context.new_page()
        browser.close()


def test_in_a_browser_a_file_is_sent_run_watched_and_fetched(page: Page, tmp_path: Path) -> None:
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    source = tmp_path / "mine.jsonl"
    source.write_bytes(lines(30))
    page.goto("/files")
    page.set_input_files("input[type=file]", source)
    page.focus("input[type=file]")
    page.keyboard.press("Tab")  # by keyboard: from the file to the button
    page.keyboard.press("Enter")
    page.wait_for_url("**/files?new=*")
    page.keyboard.press("Enter")  # the button to run it has the focus
    page.wait_for_url("**/batch/*")
    page.get_by_text("30 of 30 done, 0 failed").wait_for()  # comes without loading the page again
    page.get_by_text("completed", exact=True).wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name="Answers", exact=True).click()
    rows = Path(download.value.path()).read_text().splitlines()
    assert len(rows) == 30
    assert faults == []


def test_in_a_browser_a_batch_is_cancelled(page: Page, tmp_path: Path) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_bytes(lines(2000))
    page.goto("/files")
    page.set_input_files("input[type=file]", source)
    page.get_by_role("button", name="Upload").click()
    page.wait_for_url("**/files?new=*")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("button", name="Cancel this batch").click()
    page.get_by_text("cancelled", exact=True).wait_for()


def test_axe_finds_nothing_to_object_to(page: Page, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    source = tmp_path / "mine.jsonl"
    source.write_bytes(lines(12) + json.dumps(line("bad", body={"max_tokens": -1})).encode())
    shown = ["/", "/files", "/keys", "/nothing"]
    found = [_violations(page, axe, path, "light", 1280) for path in shown]
    page.goto("/files")
    page.set_input_files("input[type=file]", source)
    page.get_by_role("button", name="Upload").click()
    page.wait_for_url("**/files?new=*")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_url("**/batch/*")
    batch = page.url
    found.append(_violations(page, axe, batch, "light", 1280))  # while it runs
    page.get_by_text("completed", exact=True).wait_for()
    found += [_violations(page, axe, path, "dark", 390) for path in (*shown, batch)]
    found.append(_violations(page, axe, batch, "light", 390))
    assert [one for one in found if one] == []


def _violations(page: Page, axe: Any, path: str, scheme: Any, width: int) -> list[str]:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(path)
    violations = axe.run(page).response["violations"]
    return [f"{path} {scheme}: {one['id']}: {node['html'][:200]}" for one in violations for node in one["nodes"]]

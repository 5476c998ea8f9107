"""TLS by options: a client that trusts the certificate gets in, a client that speaks plain HTTP does not."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")
from serve_cases import lines
from serve_process import service_process

OPENSSL = shutil.which("openssl")


@pytest.mark.skipif(OPENSSL is None, reason="needs openssl")
def test_a_service_speaks_tls(tmp_path: Path) -> None:
    assert OPENSSL is not None
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [OPENSSL, *made, *names, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    trusted = ssl.create_default_context(cafile=str(certificate))
    options = ("--tls-cert", str(certificate), "--tls-key", str(key))
    with service_process(tmp_path / "data", "http://127.0.0.1:9/v1", *options, trusted=trusted) as service:
        with httpx2.Client(base_url=service.url, verify=trusted) as client:
            files = {"file": ("in.jsonl", lines(2))}
            file = client.post("/v1/files", files=files, data={"purpose": "batch"}).json()
            assert client.get(f"/v1/files/{file['id']}/content").content == lines(2)
            body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            batch = client.post("/v1/batches", json=body).json()
            assert client.get(f"/v1/batches/{batch['id']}").json()["id"] == batch["id"]
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"http://127.0.0.1:{service.port}/health/live")

"""A tour through the service with whichever `openai` package runs this: the v1, v2 or v3 line, unmodified.

    python tests/serve_sdk_tour.py http://127.0.0.1:8000/v1

`scripts/test-openai` runs it with all three. It needs no other package.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import sys
import tempfile
import time
from pathlib import Path

import openai

ENDPOINT = "/v1/chat/completions"


def lines(count: int) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    rows = [{"custom_id": f"id-{n}", "method": "POST", "url": ENDPOINT, "body": body} for n in range(count)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def tour(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", lines(20)), purpose="batch")
    assert client.files.wait_for_processing(file.id).status == "processed"
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while client.batches.retrieve(batch.id).status not in ("completed", "failed"):
        time.sleep(0.05)
    done = client.batches.retrieve(batch.id)
    assert done.status == "completed", done
    assert done.output_file_id is not None
    assert len(client.files.content(done.output_file_id).text.splitlines()) == 20
    assert done.id in [found.id for found in client.batches.list(limit=5)]
    second = client.files.create(file=("in.jsonl", lines(4000)), purpose="batch")
    begun = client.batches.create(input_file_id=second.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert client.batches.cancel(begun.id).status == "cancelling"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "big.jsonl"
        path.write_bytes(lines(500))
        joined = client.uploads.upload_file_chunked(
            file=path, mime_type="application/jsonl", purpose="batch", part_size=10_000
        )
    assert joined.file is not None
    assert client.files.content(joined.file.id).content == lines(500)
    assert client.files.delete(file.id).deleted
    try:
        client.files.retrieve(file.id)
    except openai.NotFoundError:
        pass
    else:
        raise AssertionError("a deleted file was found")
    assert [model.id for model in client.models.list()] == ["m"]


def unwrap(client: openai.OpenAI) -> str:
    """Verify a webhook as the service signs it, where this package can."""
    if not hasattr(client, "webhooks"):
        return "this version has no webhooks"
    secret = base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
    event = {"id": "evt_1", "object": "event", "type": "batch.completed", "created_at": 1, "data": {"id": "batch_1"}}
    body, stamp = json.dumps(event), str(int(time.time()))
    signed = hmac.new(base64.b64decode(secret), f"wh_1.{stamp}.{body}".encode(), hashlib.sha256).digest()
    headers = {
        "webhook-id": "wh_1",
        "webhook-timestamp": stamp,
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
    }
    found = client.webhooks.unwrap(body, headers, secret=f"whsec_{secret}")
    assert found.type == "batch.completed"
    return "webhooks verified"


def main() -> None:
    with openai.OpenAI(base_url=sys.argv[1], api_key="none") as client:
        tour(client)
        print(f"openai {openai.__version__}: all is well, {unwrap(client)}")


if __name__ == "__main__":
    main()

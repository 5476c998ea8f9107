"""A batch file of every kind of line, and what a crash may not change of its answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

NUM_LINES = 160


def batch_file(path: Path, most_tokens: int = 300, num_lines: int = NUM_LINES) -> Path:
    """Lines of both endpoints, greedy and sampled, a few of them wrong."""
    source = random.Random(5)
    lines = []
    for number in range(num_lines):
        body: dict[str, Any] = {"model": "m", "max_tokens": 1 + number * 37 % most_tokens, "ignore_eos": True}
        if number % 3:
            url, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": f"what is number {number}?"}]
        else:
            url, body["prompt"] = (
                "/v1/completions",
                "the answer to the question is in the text " * source.randrange(1, 5),
            )
        if number % 4 == 1:
            body |= {"temperature": 1.0, "n": 1 + number % 2, "top_p": 0.9}
        if number % 40 == 7:
            body["tools"] = [{"type": "function"}]
        lines.append(json.dumps({"custom_id": f"r{number}", "method": "POST", "url": url, "body": body}))
    path.write_text("\n".join(lines))
    return path


def comparable(path: Path) -> dict[str, Any]:
    """Rows by custom_id without what a run's history may change: created and cached_tokens."""
    rows = {}
    for text in path.read_text().splitlines():
        row = json.loads(text)
        assert row["custom_id"] not in rows, "a request was answered twice"
        body = (row["response"] or {}).get("body", {})
        body.pop("created", None)
        body.get("usage", {}).pop("prompt_tokens_details", None)
        rows[row["custom_id"]] = row
    return rows

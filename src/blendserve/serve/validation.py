"""Does a file make a batch? Its lines are read once, and what every line must have is checked.

What only one line gets wrong in its body is no fault of the file: the engine makes an error row of it later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blendserve.dialect.urls import canonical_url
from blendserve.dialect.values import shown
from blendserve.errors import RequestError
from blendserve.job.json_lines import parse_json
from blendserve.job.reader import DEFAULT_MAX_LINE_BYTES
from blendserve.serve.settings import ServeSettings

MAX_ERRORS = 100


@dataclass(frozen=True, slots=True)
class Validated:
    """What a file holds. `errors` are OpenAI's, at most `MAX_ERRORS`; `model` is None where there are any."""

    num_lines: int
    model: str | None
    errors: tuple[dict[str, Any], ...]


class _Checker:
    def __init__(self, settings: ServeSettings, endpoint: str) -> None:
        self.errors: list[dict[str, Any]] = []
        self.num_lines = 0
        self.model: str | None = None
        self._settings = settings
        self._endpoint = endpoint
        self._seen: set[bytes] = set()

    def line(self, number: int, content: bytes) -> None:
        self.num_lines += 1
        try:
            value = parse_json(content)
        except RequestError as error:
            return self._refuse(number, "invalid_json_line", f"{error.message}.")
        if not isinstance(value, dict):
            return self._refuse(number, "invalid_json_line", "The line is no JSON object.")
        self._custom_id(number, value.get("custom_id"))
        if value.get("method", "POST") != "POST":
            self._refuse(number, "invalid_method", f"method is {shown(value['method'])}; it must be POST.", "method")
        url = value.get("url")
        if not isinstance(url, str) or canonical_url(url) != self._endpoint:
            message = f"url is {shown(url)}, and the batch is for {self._endpoint}."
            self._refuse(number, "url_mismatch", message, "url")
        body = value.get("body")
        if not isinstance(body, dict):
            return self._refuse(number, "invalid_json_line", "body is missing or no JSON object.", "body")
        return self._model(number, body.get("model"))

    def _custom_id(self, number: int, custom_id: object) -> None:
        if not isinstance(custom_id, str) or not custom_id:
            message = "custom_id is missing or no text; every line needs one of its own."
            return self._refuse(number, "missing_required_parameter", message, "custom_id")
        digest = hashlib.blake2b(custom_id.encode(), digest_size=15).digest()
        if digest in self._seen:
            message = f"custom_id {shown(custom_id)} was used by an earlier line."
            return self._refuse(number, "duplicate_custom_id", message, "custom_id")
        self._seen.add(digest)
        return None

    def _model(self, number: int, name: object) -> None:
        found = self._settings.model_named(name) if isinstance(name, str) or name is None else None
        if found is not None and found.accepts_any_name and isinstance(name, str):
            found = replace(found, name=name)
        if found is None:
            served = ", ".join(model.name for model in self._settings.models)
            self._refuse(number, "model_not_found", f"model is {shown(name)}; this service has {served}.", "model")
        elif self.model not in (None, found.name):
            message = f"model is {shown(name)}, and earlier lines ask for {self.model}; a batch has one model."
            self._refuse(number, "model_mismatch", message, "model")
        else:
            self.model = found.name

    def _refuse(self, number: int | None, code: str, message: str, param: str | None = None) -> None:
        if len(self.errors) < MAX_ERRORS:
            self.errors.append({"code": code, "line": number, "message": message, "param": param})

    def result(self, max_lines: int) -> Validated:
        if not self.num_lines:
            self._refuse(None, "empty_file", "The input file has no requests.", "input_file_id")
        if self.num_lines > max_lines:
            message = f"The input file has more than {max_lines} lines, which is the limit of this service."
            self._refuse(None, "too_many_tasks", message, "input_file_id")
        return Validated(self.num_lines, None if self.errors else self.model, tuple(self.errors))


def validate_file(
    path: Path, endpoint: str, settings: ServeSettings, is_stopped: Callable[[], bool] = lambda: False
) -> Validated:
    """Check every line of a file. Reading ends early once `is_stopped`. Raises: OSError."""
    checker = _Checker(settings, endpoint)
    max_lines = settings.limits.max_batch_lines
    with path.open("rb") as file:
        number = 0
        while line := file.readline(DEFAULT_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > DEFAULT_MAX_LINE_BYTES and not line.endswith(b"\n"):
                message = f"The line is longer than {DEFAULT_MAX_LINE_BYTES} bytes, which is the limit."
                checker._refuse(number, "invalid_json_line", message)
                checker.num_lines += 1
                break
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if content.strip():
                checker.line(number, content)
            if checker.num_lines > max_lines or (number % 256 == 0 and is_stopped()):
                break
    return checker.result(max_lines)

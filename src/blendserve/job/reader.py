"""A batch file, read as a stream: every line that is not blank becomes a `BatchLine` or a `BadLine`, in order.

Memory is bounded by a few times `max_line_bytes`, beside 15 bytes of hash (about 100 in Python) per custom_id.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blendserve.dialect.passthrough import parse_remote_line
from blendserve.dialect.schema import BatchLine, ServedModel, custom_id_of, parse_line
from blendserve.dialect.values import shown
from blendserve.errors import ConfigError, RequestError
from blendserve.job.foreign import FRAME, FormatWatch, format_of
from blendserve.job.input_file import BUFFER_BYTES, DamagedError, HashingFile, open_input, unpacked
from blendserve.job.json_lines import UTF8_MARK, custom_id_in, joined_objects, line_error, nested_too_deeply, parse_json
from blendserve.job.other_models import OtherModels

DEFAULT_MAX_LINE_BYTES = 32 << 20
DEFAULT_MAX_LINE_REQUESTS = 2048
DEFAULT_MAX_REQUESTS = 5_000_000
MAX_TOLD_FAULTS = 5
_BLANKS = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """How much a batch file may ask for. `n` and lists of prompts count as so many answers.

    - `max_line_bytes`: longest line, in bytes (default: 33554432, which is 32 MiB). A longer one becomes an error row.
    - `max_line_requests`: most answers to one line (default: 2048). A line that asks for more becomes an error row.
    - `max_requests`: most answers to the whole file (default: 5000000). A file that asks for more is refused.
    """

    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES
    max_line_requests: int = DEFAULT_MAX_LINE_REQUESTS
    max_requests: int = DEFAULT_MAX_REQUESTS


DEFAULT_LIMITS = ReadLimits()


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be served; `custom_id` is what could be read of it."""

    line_number: int
    custom_id: str | None
    error: RequestError


class BatchReader:
    """One pass over a batch file.

    After the pass `sha256` is the hash of the file's bytes as stored, `num_lines` counts the lines that are not blank,
    `requested_model` is the model name that the file agreed on (that of its first valid line), and `other_models` says
    which models its lines ask for that are not here. `refuses_other_models`: such lines refuse the file.
    """

    def __init__(
        self,
        path: Path,
        served: ServedModel,
        limits: ReadLimits = DEFAULT_LIMITS,
        *,
        refuses_other_models: bool = False,
    ) -> None:
        self.sha256 = ""
        self.num_lines = 0
        self.requested_model: str | None = None
        self.other_models = OtherModels()
        self._path = path
        self._served = served
        self._limits = limits
        self._refuses_other_models = refuses_other_models
        self._num_requests = 0
        self._seen: set[bytes] = set()
        self._formats = FormatWatch()

    def __iter__(self) -> Iterator[BatchLine | BadLine]:
        """Yield every line that is not blank. Raises: ConfigError when the file cannot be read at all, holds no line,
        or is of another format.
        """
        with open_input(self._path) as file:
            hashing = HashingFile(file)
            stored = io.BufferedReader(hashing, BUFFER_BYTES)
            for line_number, content in self._number_lines(unpacked(stored, self._path)):
                line = self._parse(line_number, content)
                if self._formats.is_sure:
                    break
                self._count(line)
                yield line
            while stored.read(BUFFER_BYTES):
                pass  # what follows a damaged stream belongs to the hash too
            self.sha256 = hashing.sha256.hexdigest()
        if (reason := self._formats.verdict(self._path)) is not None:
            raise ConfigError(reason)
        if not self.num_lines:
            raise ConfigError(f"{self._path} is empty: a batch file has one request in each line")
        if self._refuses_other_models:
            reason = self.other_models.reason(self._path, self._served.name)
            if reason is not None:
                raise ConfigError(reason)

    def _number_lines(self, content: io.BufferedReader[Any]) -> Iterator[tuple[int, bytes | BadLine]]:
        """Lines by number; one that holds several requests counts as several lines."""
        line_number = 0
        try:
            while line := content.readline(self._limits.max_line_bytes + 1):
                line_number += 1
                if len(line) > self._limits.max_line_bytes and not line.endswith(b"\n"):
                    _skip_line(content)
                    yield line_number, self._too_long(line_number, line)
                    continue
                while line.startswith(UTF8_MARK):  # files that were joined may have one in the middle
                    line = line.removeprefix(UTF8_MARK)
                line = line.strip(_BLANKS)
                if line:
                    *before, last = joined_objects(line) or [line]
                    for piece in before:
                        yield line_number, piece
                        line_number += 1
                    yield line_number, last
        except DamagedError as error:
            damage = line_error("truncated_input", f"{error}; compress the file again")
            yield line_number + 1, BadLine(line_number + 1, None, damage)

    def _too_long(self, line_number: int, line: bytes) -> BadLine:
        limit = self._limits.max_line_bytes
        message = f"the line is longer than {limit} bytes, which is the limit; shorten or split it"
        custom_id = self._salvage(line)
        return BadLine(line_number, custom_id, line_error("line_too_long", message))

    def _salvage(self, line: bytes) -> str | None:
        """The custom_id of a line that is no valid JSON."""
        custom_id = custom_id_in(line) if line.startswith(b"{") else None
        self._formats.add_broken(line, custom_id)
        return custom_id

    def _parse(self, line_number: int, content: bytes | BadLine) -> BatchLine | BadLine:
        self.num_lines += 1
        if isinstance(content, BadLine):
            return content
        try:
            value = parse_json(content)
        except RequestError as error:
            return BadLine(line_number, self._salvage(content), error)
        self._formats.add(content, value)
        custom_id = custom_id_of(value)
        try:
            self._check_first_use(value)
            line = self._parse_value(value, line_number)
            self._check_model(line)
            self._check_requests(line)
        except RequestError as error:
            return BadLine(line_number, custom_id, self._explained(error, value, line_number))
        except RecursionError:  # deep enough to be read, too deep to be quoted or written again
            return BadLine(line_number, custom_id, nested_too_deeply())
        return replace(line, digest=digest_of(content))

    def _parse_value(self, value: object, line_number: int) -> BatchLine:
        parse = parse_remote_line if self._served.is_remote else parse_line
        return parse(value, line_number, self._served)

    def _explained(self, error: RequestError, value: object, line_number: int) -> RequestError:
        """The error of a line with what else is wrong with it. Mutates: `other_models`."""
        if error.code == "model_not_found" and isinstance(value, dict):
            self.other_models.add(value["body"]["model"], line_number)
        if error.status_code == 0 and (other := format_of(value)) is not None:
            return line_error("unknown_format", f"the line {other.phrase}; write it as {FRAME}", error.param)
        more = [] if error.code == "model_not_found" else self._more_faults(error, value, line_number)
        if not more:
            return error
        message = "; also: ".join((error.message, *more))
        return RequestError(message, code=error.code, param=error.param, status_code=error.status_code)

    def _more_faults(self, error: RequestError, value: object, line_number: int) -> list[str]:
        """What is wrong with the line besides: it is tried again without the field that is known to be wrong."""
        messages: list[str] = []
        params = {error.param}
        while len(params) < MAX_TOLD_FAULTS and (value := _without(value, error.param)) is not None:
            try:
                self._parse_value(value, line_number)
                break
            except RequestError as other:
                error = other
            except RecursionError:
                break
            if error.param in params or error.code in ("missing_required_parameter", "model_not_found"):
                break
            params.add(error.param)
            messages.append(error.message)
        return messages

    def _check_requests(self, line: BatchLine) -> None:
        limit = self._limits.max_line_requests
        if line.num_choices > limit:
            raise RequestError(
                f"the line asks for {line.num_choices} answers ({len(line.prompts)} prompts, n {line.sampling.n}); at "
                f"most {limit}: split it, or raise --max-line-requests",
                code="too_many_requests",
                param="n",
            )

    def _count(self, line: BatchLine | BadLine) -> None:
        """Raises: ConfigError when the file as a whole asks for too much: better before the work than in its midst."""
        self._num_requests += line.num_choices if isinstance(line, BatchLine) else 1
        if self._num_requests > self._limits.max_requests:
            raise ConfigError(
                f"{self._path} asks for more than {self._limits.max_requests} answers up to line {line.line_number}; "
                "split the file, or raise --max-requests"
            )

    def _check_first_use(self, value: object) -> None:
        custom_id = value.get("custom_id") if isinstance(value, dict) else None
        if not isinstance(custom_id, str) or not custom_id:
            return
        digest = hashlib.blake2b(custom_id.encode(), digest_size=15).digest()
        if digest in self._seen:
            raise line_error(
                "duplicate_custom_id",
                f"custom_id {shown(custom_id)} was used by an earlier line; every line needs its own",
                "custom_id",
            )
        self._seen.add(digest)

    def _check_model(self, line: BatchLine) -> None:
        """One file, one model: all names of the served model count as one. Mutates: `requested_model`."""
        if line.model is None or line.model in self._served.abilities.adapters:
            return
        if self.requested_model is None:
            self.requested_model = line.model
        if self._served.is_remote:  # its own server says which models it has
            return
        if line.model != self.requested_model and not {line.model, self.requested_model} <= set(self._served.names):
            raise line_error(
                "mismatched_model",
                f"the line asks for model {shown(line.model)}, an earlier line for {shown(self.requested_model)}; one "
                "model answers a batch file: split the file by model",
                "model",
            )


def digest_of(line: bytes) -> bytes:
    """What tells a line apart from a changed one."""
    return hashlib.blake2b(line, digest_size=16).digest()


_NEEDING = {"tools": ("tool_choice", "parallel_tool_calls"), "logprobs": ("top_logprobs",)}
"""Fields that are wrong only because another one is gone."""


def _without(value: object, param: str | None) -> object:
    """A line in which one field is not wrong any more; None where that cannot be done."""
    if not isinstance(value, dict) or param is None:
        return None
    if param == "method":
        return {**value, "method": "POST"}
    if param == "custom_id":
        return {**value, "custom_id": "mended"}
    body = value.get("body")
    if not isinstance(body, dict) or param not in body:
        return None
    gone = {param, *_NEEDING.get(param, ())}
    return {**value, "body": {name: field for name, field in body.items() if name not in gone}}


def _skip_line(content: io.BufferedReader[Any]) -> None:
    while (rest := content.readline(BUFFER_BYTES)) and not rest.endswith(b"\n"):
        pass

"""Single requests in the engine process: each is a batch of one line that goes ahead of all others.

A request is read, encoded, answered and written by the code that does so for lines, so that its answer is what a batch
would give. Only pieces of streamed answers are made here.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blendserve.dialect.codec import ModelCodec
from blendserve.dialect.rows import error_row
from blendserve.dialect.schema import BatchLine, ServedModel, parse_line
from blendserve.dialect.urls import CHAT_URL, RESPONSES_URL
from blendserve.engine.front import Front
from blendserve.engines.base import Engine
from blendserve.errors import BlendServeError, RequestError
from blendserve.job.ingest import TokenLists, encode_lines
from blendserve.job.reader import BadLine
from blendserve.job.record_log import RecordKind, RecordLog
from blendserve.job.rows import RowAssembler
from blendserve.job.store import TokenStore
from blendserve.job.store_writer import StoreWriter
from blendserve.request import SequenceOutput, TokenIds
from blendserve.serve.messages import Ask, Piece, Reply

_UNFINISHED = "\ufffd"  # what decoding gives for bytes that are not yet a character
_MEMORY = Path("/dev/shm")


class _Log(RecordLog):
    """A log that knows its latest row."""

    _offset = 0

    def append(self, kind: RecordKind, line_number: int, choice: int, body: bytes) -> int:
        self._offset = super().append(kind, line_number, choice, body)
        return self._offset

    def latest(self) -> bytes:
        return self.read(self._offset).body


class OnlineLine:
    """One request from its body to its answer. `is_streamed`: in pieces. An answer whose reasoning or calls are taken
    out at its end is sent then, as one piece.

    Raises: RequestError for what cannot be answered.
    """

    def __init__(self, ask: Ask, engine: Engine, served: ServedModel) -> None:
        self.ask = ask
        self.answer: Reply | None = None
        self._is_closed = False
        self._engine = engine
        with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as name:
            self._open(Path(name), served)  # files stay open and mapped when their names are gone

    @property
    def num_requests(self) -> int:
        return self.store.num_requests

    @property
    def body(self) -> bytes:
        """What the engine itself reads of the line."""
        return self.store.body(0)

    def apply(self, number: int, output: SequenceOutput) -> None:
        """Take the end of one request; `answer` is set once all have ended."""
        self._rows.apply(number, output)
        if self._rows.num_rows and self.answer is None:
            self.answer = _reply(self.ask.id, self._log.latest())
            self.close()

    def close(self) -> None:
        """Nothing is applied any more. Closing again does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._log.close()

    def text_so_far(self, token_ids: TokenIds) -> str:
        """What the tokens of an unfinished answer surely begin with."""
        output = SequenceOutput(0, token_ids, "length", 0, 0)
        text = self._engine.codec.text_of(output, self.store.sampling(0)).rstrip(_UNFINISHED)
        return text[: len(text) - self._num_held] if self._num_held else text

    def _open(self, directory: Path, served: ServedModel) -> None:
        value = {"custom_id": self.ask.id, "method": "POST", "url": self.ask.url, "body": dict(self.ask.body)}
        line = parse_line(value, 1, served)
        writer = StoreWriter(directory / "store")

        def accept(line: BatchLine, token_ids: TokenLists) -> None:
            writer.add(line, token_ids)

        def refuse(line: BadLine) -> None:
            raise line.error

        try:
            encode_lines([line], self._engine.codec, served.max_model_len, accept, refuse)
            files = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        self.store = TokenStore.open(directory / "store", files, served.max_model_len)
        self._log = _Log(directory / "records")
        self._rows = RowAssembler(self.store, self._log, self._engine.codec, served.name, self.ask.created)
        stops = line.sampling.stop
        self._num_held = max(map(len, stops)) - 1 if stops else 0
        codec = self._engine.codec
        is_taken_apart = self.ask.url in (CHAT_URL, RESPONSES_URL) and (
            bool(self.ask.body.get("tools")) or not isinstance(codec, ModelCodec) or codec.marks_reasoning
        )
        self.is_streamed = self.ask.is_streamed and not is_taken_apart


class Online:
    """All requests that are asked now. `ask` is called by the thread that listens, the rest by the engine's."""

    def __init__(self, engine: Engine, served: ServedModel, send: Any) -> None:
        self.front = Front(self._on_tokens, self._on_output)
        self._engine = engine
        self._served = served
        self._send = send
        self._lock = threading.Lock()
        self._places: dict[int, tuple[OnlineLine, int]] = {}
        self._sent: dict[int, str] = {}
        self._indices: dict[str, list[int]] = {}

    def ask(self, ask: Ask) -> None:
        """Queue a request, or answer at once that it cannot be answered."""
        try:
            line = OnlineLine(ask, self._engine, self._served)
            requests = [line.store.request(number, 0) for number in range(line.num_requests)]
        except BlendServeError as error:
            self._send(_reply(ask.id, error_row(1, None, error)))
            return
        except OSError as error:
            full = RequestError(f"the request cannot be kept: {error.strerror}", code="no_space", status_code=507)
            self._send(_reply(ask.id, error_row(1, None, full)))
            return
        with self._lock:
            indices = self.front.add(requests, line.body)
            self._places |= {index: (line, number) for number, index in enumerate(indices)}
            self._indices[ask.id] = indices

    def forget(self, id: str) -> None:
        """Nobody waits for an answer any more: what has not begun never runs."""
        with self._lock:
            indices = self._indices.pop(id, [])
            for index in indices:
                self._sent.pop(index, None)
                line, _ = self._places.pop(index, (None, 0))
                if line is not None:
                    line.close()
        self.front.withdraw(indices)

    def _on_tokens(self, index: int, token_ids: TokenIds) -> None:
        with self._lock:
            line, number = self._places.get(index, (None, 0))
        if line is not None and line.is_streamed:
            self._send_piece(line, index, number, line.text_so_far(token_ids))

    def _on_output(self, index: int, output: SequenceOutput) -> None:
        with self._lock:
            self._sent.pop(index, None)
            line, number = self._places.pop(index, (None, 0))
            if line is None:
                return
            line.apply(number, output)
            if line.answer is not None:
                self._indices.pop(line.ask.id, None)
        if line.answer is not None:
            self._send(line.answer)

    def _send_piece(self, line: OnlineLine, index: int, number: int, text: str) -> None:
        sent = self._sent.get(index, "")
        if len(text) > len(sent) and text.startswith(sent):
            self._sent[index] = text
            self._send(Piece(line.ask.id, number, text[len(sent) :]))


def _reply(id: str, row: bytes) -> Reply:
    """The HTTP answer that a row stands for."""
    fields: Mapping[str, Any] = json.loads(row)
    response = fields["response"]
    if response is not None:
        body = response["body"]
        if response["status_code"] != 200:
            body["error"]["message"] = _without_line(str(body["error"]["message"]))
        return Reply(id, int(response["status_code"]), body)
    error = fields["error"]
    is_ours = error["code"] in ("server_error", "insufficient_memory")
    body = {
        "error": {
            "message": _without_line(error["message"]),
            "type": "server_error" if is_ours else "invalid_request_error",
            "param": error.get("param"),
            "code": error["code"],
        }
    }
    return Reply(id, 500 if error["code"] == "server_error" else 400, body)


def _without_line(message: str) -> str:
    return message.removeprefix("line 1: ")

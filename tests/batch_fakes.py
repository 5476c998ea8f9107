"""A tokenizer of bytes and an engine of hashes: deterministic, order-independent, no weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blendserve.dialect.extras import native_abilities
from blendserve.dialect.schema import ServedModel
from blendserve.errors import RequestError
from blendserve.job.job import BatchJob, JobReport
from blendserve.job.pending import PendingRequests
from blendserve.job.run import Generate, run_job
from blendserve.models.chat_formats import AnswerParts
from blendserve.models.conversation import Conversation, text_of_content
from blendserve.models.tool_formats.format import Tool
from blendserve.request import Request, SamplingParams, SequenceOutput, StructuredOutputs, TokenLogprob

EOS = 0
NUM_JOB_LINES = 60
NUM_JOB_REQUESTS = 122  # choices of the valid ones among `mixed_lines(60)`
SERVED = ServedModel(
    ("tiny", "models/tiny"), vocab_size=256, max_model_len=2048, abilities=native_abilities(hidden_size=4)
)


class FakeCodec:
    """One token per byte of UTF-8. Texts that hold "unspeakable" cannot be encoded."""

    def __init__(self) -> None:
        self.num_calls = 0

    def encode(self, prompts: Sequence[str | Conversation]) -> list[list[int]]:
        self.num_calls += 1
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: str | Conversation) -> list[int]:
        if not isinstance(prompt, str):
            prompt = "".join(
                f"{message['role']}:{text_of_content(message['content'])}\n" for message in prompt.messages
            )
        if "unspeakable" in prompt:
            raise RequestError("the template takes no such text", code="invalid_value", param="messages")
        return list(prompt.encode())

    def text_of(self, output: SequenceOutput, _: SamplingParams) -> str:
        ends_in_stop_token = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
        token_ids = output.token_ids[:-1] if ends_in_stop_token else output.token_ids
        return bytes(token_ids.tolist()).decode(errors="replace")

    def use_date(self, date: str) -> None:
        pass

    def settled(self, structure: StructuredOutputs, prompt_token_ids: Any) -> StructuredOutputs:  # noqa: ARG002
        return structure

    def parts_of(
        self,
        prompt_token_ids: Any,
        output: SequenceOutput,
        sampling: SamplingParams,
        tools: Sequence[Tool],
        *,
        may_call: bool,
    ) -> tuple[AnswerParts, int]:
        assert len(prompt_token_ids)
        assert not tools
        assert not may_call
        return AnswerParts(self.text_of(output, sampling)), 0

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def answer(request: Request, num_cached_tokens: int = 0) -> SequenceOutput:
    """Lower-case letters that depend on prompt, seed and parameters only; half of the answers end in EOS."""
    sampling = request.sampling
    what = f"{request.prompt_token_ids.tolist()} {request.seed} {sampling}".encode()
    digest = hashlib.blake2b(what, digest_size=32).digest()
    letters = [97 + byte % 26 for byte in digest[: min(12, request.max_output_tokens)]]
    is_stopped = digest[-1] % 2 == 0 and bool(letters)
    if is_stopped:
        letters[-1] = EOS
    logprobs: tuple[TokenLogprob, ...] = ()
    if sampling.logprobs is not None:
        top = tuple((98 + rank, -1.0 - rank) for rank in range(sampling.logprobs))
        logprobs = tuple(TokenLogprob(letter, -0.5, top) for letter in letters)
    return SequenceOutput(
        index=request.index,
        token_ids=np.asarray(letters, np.int32),
        finish_reason="stop" if is_stopped else "length",
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        logprobs=logprobs,
        prompt_logprobs=_prompt_logprobs(request),
        embedding=None if request.embedding is None else (request.prompt_token_ids[:4] / 3).astype(np.float32),
    )


def _prompt_logprobs(request: Request) -> tuple[TokenLogprob | None, ...] | None:
    num_top = request.sampling.prompt_logprobs
    if num_top is None:
        return None
    token_ids = request.prompt_token_ids.tolist()
    top = tuple((98 + rank, -1.0 - rank) for rank in range(num_top))
    return (None, *(TokenLogprob(token, -float(at), top) for at, token in enumerate(token_ids[1:], start=1)))


class FakeEngine:
    """Answers in the given order ("forward", "backward"); `on_answer` is called before each, with the count so far."""

    def __init__(self, order: str = "forward", on_answer: Callable[[int], None] = lambda _: None) -> None:
        self.num_answers = 0
        self._order = order
        self._on_answer = on_answer

    def __call__(self, pending: PendingRequests) -> Iterator[SequenceOutput]:
        rows = range(len(pending)) if self._order == "forward" else reversed(range(len(pending)))
        for position, row in enumerate(rows):
            self._on_answer(self.num_answers)
            self.num_answers += 1
            yield answer(pending[row], num_cached_tokens=min(position, 3))


def batch_line(custom_id: Any, body: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A chat line; a completions line where the body holds a prompt, one of embeddings where it holds an input."""
    body = {"messages": [{"role": "user", "content": f"hello {custom_id}"}]} if body is None else body
    url_by_field = {"prompt": "/v1/completions", "input": "/v1/embeddings"}
    url = next((url_by_field[name] for name in url_by_field if name in body), "/v1/chat/completions")
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "tiny", **body}, **fields}


def write_lines(path: Path, lines: Sequence[dict[str, Any] | str | bytes]) -> Path:
    """Write one line per entry: objects as JSON, strings and bytes as they are."""
    path.write_bytes(b"".join(_line_bytes(line) + b"\n" for line in lines))
    return path


def _line_bytes(line: dict[str, Any] | str | bytes) -> bytes:
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line)).encode()


def mixed_lines(num_lines: int) -> list[dict[str, Any] | str]:
    """Chat and completions, several choices and prompts, log probabilities, and every ninth line bad."""
    lines: list[dict[str, Any] | str] = []
    for number in range(num_lines):
        prompt = {"prompt": f"Once {number % 7}", "max_tokens": 1 + number % 11}
        kinds: list[dict[str, Any] | str] = [
            batch_line(f"id-{number}"),
            batch_line(f"id-{number}", {"prompt": f"Once {number % 7}", "n": 3, "seed": number}),
            batch_line(f"id-{number}", {**prompt, "logprobs": 2}),
            batch_line(f"id-{number}", {"prompt": ["one", [116, 119, 111]], "n": 2}),
        ]
        lines.append("{not json" if number % 9 == 8 else kinds[number % 4])
    return lines


def run_fake(
    input_path: Path, output_path: Path, engine: Generate | None = None, codec: FakeCodec | None = None, **fields: Any
) -> JobReport:
    """`run_job` on the fakes, at a fixed time."""
    clock = fields.pop("clock", lambda: 1_700_000_000.0)
    options = {name: fields.pop(name) for name in ("on_progress", "max_planned") if name in fields}
    job = BatchJob(input_path, output_path, fields.pop("served", SERVED), "tiny@1", **fields)
    return run_job(job, codec or FakeCodec(), engine or FakeEngine(), clock=clock, **options)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def comparable(path: Path) -> list[dict[str, Any]]:
    """Rows without what may differ between a resumed and an uninterrupted run, sorted: `cached_tokens` only."""
    rows = read_rows(path)
    for row in rows:
        if row["response"] and "usage" in row["response"]["body"]:
            del row["response"]["body"]["usage"]["prompt_tokens_details"]
    return sorted(rows, key=lambda row: str(row["id"]))


def stop_after(num_answers: int, error: BaseException) -> FakeEngine:
    """An engine that raises `error` once it has given so many answers."""

    def on_answer(count: int) -> None:
        if count == num_answers:
            raise error

    return FakeEngine(on_answer=on_answer)


def errors_of(output: Path) -> Path:
    return output.with_name(output.name.removesuffix(".jsonl") + ".errors.jsonl")

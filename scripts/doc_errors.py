"""Error rows of docs/batch-files.md: a job is run for every code, and its row is shown."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from batch_fakes import run_fake
from tiny_files import tiny_directory
from vllm_cases import ABLE, run_vllm, vllm_engine

from blendserve import HttpSettings, NativeSettings, run_batch
from blendserve.engines.http.fake_server import FakeSettings, serving
from blendserve.engines.vllm.fake import FakeVllm
from blendserve.engines.vllm.requests import failed_output, output_of
from blendserve.errors import ExecutorError
from blendserve.job.passing import PASSING_CODES
from blendserve.job.pending import PendingRequests
from blendserve.request import SequenceOutput

Run = Callable[[Path, Path], None]
"""Answers an input file into an output file."""
MOST_SHOWN = 240
_LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 60


class Example(NamedTuple):
    """A code, what it means, and the line that shows it; `before` are lines that it needs in front of it."""

    code: str
    meaning: str
    line: str
    before: tuple[str, ...] = ()


def line(body: dict[str, Any] | None = None, **fields: Any) -> str:
    """A chat line with a good body unless told otherwise; a field of None is left out."""
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    url = "/v1/completions" if body and "prompt" in body else "/v1/chat/completions"
    values = {"custom_id": "a", "method": "POST", "url": url, "body": chat if body is None else body, **fields}
    return json.dumps({name: value for name, value in values.items() if value is not None})


def asks(**fields: Any) -> str:
    """A chat line with further fields in its body."""
    return line({"messages": [{"role": "user", "content": "Hi"}], **fields})


REQUEST_EXAMPLES = (
    Example("invalid_json_line", "The line is not a JSON object.", '{"custom_id": "a", "method": POST}'),
    Example(
        "unknown_format",
        "The line has the format of another tool. A file of nothing else is refused as a whole.",
        '{"prompt": "Hi"}',
        (line(custom_id="b"),),
    ),
    Example("missing_required_parameter", "Something that every line needs is missing.", line(custom_id=None)),
    Example("invalid_custom_id", "`custom_id` is not a string, or is empty.", line(custom_id=7)),
    Example(
        "duplicate_custom_id", "Two lines have the same `custom_id`. The first one is answered.", line(), (line(),)
    ),
    Example("invalid_method", '`method` is not "POST".', line(method="GET")),
    Example("invalid_url", "The engine does not answer this `url`.", line(url="/v1/chat")),
    Example(
        "mismatched_model",
        "The lines of one file name different models.",
        asks(model="gpt-4o"),
        (line({"prompt": "Hi", "model": "gpt-4o-mini"}, custom_id="b"),),
    ),
    Example("invalid_type", "A parameter has the wrong JSON type.", asks(temperature="hot")),
    Example("invalid_value", "A parameter is out of range.", asks(top_p=3)),
    Example("unknown_parameter", "No parameter has this name.", asks(temprature=1)),
    Example(
        "unsupported_parameter",
        "The engine does not support the parameter, and leaving it out would change the answer.",
        asks(tools=[{"type": "function", "function": {"name": "f"}}]),
    ),
    Example(
        "unsupported_schema",
        "The schema asks for something that cannot be followed. The message names it.",
        asks(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}}),
    ),
    Example("invalid_grammar", "A regular expression or a grammar has an error.", asks(guided_regex="(yes|no")),
    Example("context_length_exceeded", "The prompt does not fit the model's context.", line({"prompt": _LONG_PROMPT})),
    Example(
        "too_many_requests",
        "The line asks for more answers than `--max-line-requests`. `n` and lists of prompts count.",
        line({"prompt": ["Hi"] * 20, "n": 128}),
    ),
    Example(
        "insufficient_memory",
        "Prompt and answer need more KV memory than there is. More memory tries the line again.",
        line({"prompt": "Hi", "max_tokens": 100, "ignore_eos": True}),
    ),
)
FILE_EXAMPLES = (
    Example("line_too_long", "The line has more than 32 MiB.", line({"prompt": "a" * (32 << 20)})),
    Example("truncated_input", "A compressed file is damaged. Lines before the damage are answered.", line()),
)
HTTP_EXAMPLES = {
    "request_timeout": ("No complete answer came within `--request-timeout`, `--max-attempts` times.", {"hang": 1.0}),
    "connection_error": ("The connection broke, `--max-attempts` times.", {"reset": 1.0}),
    "invalid_server_response": ("The server's answer was not valid, `--max-attempts` times.", {"malformed": 1.0}),
}
SERVER_WORDS = (
    "A server's error is a row with the server's own status and body. Its code is the server's too; without one, the "
    "summary counts the row as `http_` and the status, such as `http_500`. A reply of status 200 that is an error, or "
    "that holds no answer, is an error row with both. There `response` is what the server sent, and `error` says what "
    "is wrong with it. Its code is the server's, or `no_answer`. Errors that cannot change are not asked for again. "
    "Here are two rows from the test server:"
)
OTHER_FAILURES = {
    "server_error": "The engine gave no reason.",
    "engine_error": "vLLM ended the request without an answer.",
    "grammar_too_complex": "The grammar took more work than is allowed in the middle of an answer.",
}
_STATUSES = "with status 401, 402, 403, 408, 409, 425, 429, or 500 and above |"
VLLM_EXAMPLES = {
    "invalid_value": ("vLLM refuses the request.", FakeVllm(refuses=frozenset("0"))),
    "engine_failure": ("vLLM's engine died whenever it ran this request.", FakeVllm(dies_of=frozenset("0"))),
}


def error_sections(directory: Path) -> str:
    """Every code with a line and its row; `directory` is empty and may be filled."""
    model = tiny_directory(directory / "model")
    native = NativeSettings(str(model), max_model_len=256, kv_memory_bytes=4 << 20, max_num_seqs=1, num_threads=1)
    small = replace(native, kv_memory_bytes=16 << 10)
    parts = ["### Native engine, and vLLM", ""]
    for example in REQUEST_EXAMPLES:
        settings = small if example.code == "insufficient_memory" else native
        parts += _section(example, directory, partial(_run, settings=settings))
    for example in FILE_EXAMPLES:
        parts += _section(example, directory, partial(_run, settings=native))
    parts += _section(_failure("server_error", OTHER_FAILURES["server_error"]), directory, _run_failing)
    parts += ["### vLLM only", ""]
    for code, (meaning, api) in VLLM_EXAMPLES.items():
        parts += _section(_failure(code, meaning), directory, partial(_run_vllm, api=api))
    parts += _section(_failure("engine_error", OTHER_FAILURES["engine_error"]), directory, _run_broken)
    parts += ["### HTTP engine only", ""]
    for code, (meaning, faults) in HTTP_EXAMPLES.items():
        run = _http_run(FakeSettings(faults=faults))
        parts += _section(_failure(code, meaning), directory, run)
    parts += [SERVER_WORDS, ""]
    for code, body, faults in (("fake_400", {"x": 1}, {}), ("fake_500", None, {"error": 1.0})):
        example = Example(code, "The test server's code for this case.", line(body))
        parts += _section(example, directory, _http_run(FakeSettings(faults=faults)))
    return "\n".join(parts).rstrip()


def codes_table() -> str:
    """Every code, what it means, and whether --retry-failed tries its lines again."""
    failures = {code: meaning for code, (meaning, _) in {**VLLM_EXAMPLES, **HTTP_EXAMPLES}.items()}
    meanings = {example.code: example.meaning for example in (*REQUEST_EXAMPLES, *FILE_EXAMPLES)}
    meanings |= {code: meaning for code, meaning in failures.items() if code not in meanings}
    meanings |= OTHER_FAILURES
    rows = ["| code | meaning | tried again by `--retry-failed` |", "| --- | --- | --- |"]
    for code, meaning in sorted(meanings.items()):
        is_retried = code in PASSING_CODES or code == "insufficient_memory"
        rows.append(f"| `{code}` | {meaning} | {'yes' if is_retried else 'no'} |")
    rows.append("| a server's own, or `http_` and its status | The server refused the line, or failed. | " + _STATUSES)
    return "\n".join(rows)


def codes_on(page: str) -> set[str]:
    """Codes that a page explains."""
    return set(re.findall(r"^(?:\*\*|\| )`(\w+)`(?:\*\*| \|)", page, re.MULTILINE))


def _failure(code: str, meaning: str) -> Example:
    return Example(code, meaning, line())


def _section(example: Example, directory: Path, run: Run) -> Iterator[str]:
    row = _row_of(example, directory, run)
    yield f"**`{example.code}`** {example.meaning}"
    yield ""
    yield "```json"
    yield from (_cut(text) for text in (*example.before, example.line))
    yield row
    yield "```"
    yield ""


def _row_of(example: Example, directory: Path, run: Run) -> str:
    """Run a job of the example's lines and return its one error row, with its ids cut short."""
    place = directory / f"{example.code}-{len(list(directory.iterdir()))}"
    place.mkdir()
    source, target = place / "in.jsonl", place / "out.jsonl"
    content = "\n".join((*example.before, example.line)).encode() + b"\n"
    source.write_bytes(gzip.compress(content, mtime=0)[:40] if example.code == "truncated_input" else content)
    run(source, target)
    (row,) = (place / "out.errors.jsonl").read_text().splitlines()
    assert _code_of(json.loads(row)) == example.code, f"{example.code}: {row}"
    return re.sub(r"(req_[0-9a-f]{4})[0-9a-f]{28}", r"\1...", row)


def _code_of(row: dict[str, Any]) -> str:
    error = row["error"] or row["response"]["body"]["error"]
    return str(error["code"] or f"http_{row['response']['status_code']}")


def _cut(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN // 2]} ... {text[-MOST_SHOWN // 2 :]}"


def _run(source: Path, target: Path, settings: NativeSettings | HttpSettings) -> None:
    run_batch(source, target, engine=settings)


def _run_vllm(source: Path, target: Path, api: FakeVllm) -> None:
    run_vllm(vllm_engine(api), source, target, served=replace(ABLE, abilities=replace(ABLE.abilities, sees=False)))


def _run_broken(source: Path, target: Path) -> None:
    """A vLLM that ends a request as it never should."""
    choice = SimpleNamespace(finish_reason="abort", token_ids=())
    output: Any = SimpleNamespace(outputs=[choice], prompt_token_ids=[1], num_cached_tokens=0)

    def generate(pending: PendingRequests) -> Iterator[SequenceOutput]:
        yield output_of(0, output, pending[0])

    run_fake(source, target, generate)


def _run_failing(source: Path, target: Path) -> None:
    def generate(_: PendingRequests) -> Iterator[SequenceOutput]:
        yield failed_output(0, ExecutorError("the engine gave no reason"))

    run_fake(source, target, generate)


def _http_run(server_settings: FakeSettings) -> Run:
    def run(source: Path, target: Path) -> None:
        with serving(server_settings) as server:
            timeout_s = 0.2 if "hang" in server_settings.faults else 60.0  # a busy machine answers late
            settings = HttpSettings(server.base_url, request_timeout_s=timeout_s, max_attempts=1, max_outage_s=5)
            run_batch(source, target, engine=settings)

    return run

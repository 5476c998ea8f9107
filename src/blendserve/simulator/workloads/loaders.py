"""Readers of published trace files: lengths from csv, texts from json and csv. Files are the user's; none ships with
the project.

Length formats become a `Trace`. Text formats become `TextRequest`s; `source.workload_from_prompts` makes a job of them
once they are tokenized.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blendserve.errors import ConfigError
from blendserve.simulator.workloads.traces import VIDEO_MEAN_TOKENS, Int64s, Trace

CountTokens = Callable[[str], int]

INPUT_COLUMNS = ("input_tokens", "contexttokens", "request tokens", "num_prompt_tokens", "prompt_len", "input_len")
OUTPUT_COLUMNS = ("output_tokens", "generatedtokens", "response tokens", "num_output_tokens", "output_len")
"""Names, in lower case, that length tables use: ours, Azure's, BurstGPT's, vLLM's."""
VIDEO_TOKENS_PER_FRAME = 256
_CSV_FIELD_LIMIT = 16 << 20


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A prompt with the answer it got; the answer's token count is its output length."""

    prompt: str
    answer: str


def load_lengths(path: Path, *, name: str | None = None) -> Trace:
    """BurstGPT, Azure, vLLM or our own length csv: the columns are known by their names. Rows without output are left
    out.

    Raises: ConfigError when the columns or the numbers are not there.
    """
    reader = csv.DictReader(_csv_lines(path))
    by_lower = {column.strip().lower(): column for column in reader.fieldnames or ()}
    source = next((by_lower[column] for column in INPUT_COLUMNS if column in by_lower), None)
    target = next((by_lower[column] for column in OUTPUT_COLUMNS if column in by_lower), None)
    if source is None or target is None:
        raise ConfigError(
            f"{path} has columns {', '.join(by_lower) or 'none'}; "
            f"it needs one of {', '.join(INPUT_COLUMNS)} and one of {', '.join(OUTPUT_COLUMNS)}"
        )
    pairs = [(_number(path, line, row, source), _number(path, line, row, target)) for line, row in enumerate(reader, 2)]
    return lengths_trace(name or path.stem, [pair for pair in pairs if min(pair) > 0])


def lengths_trace(name: str, pairs: Iterable[tuple[int, int]], *, has_known_outputs: bool = False) -> Trace:
    """A trace of (input, output) tokens that share nothing but a first token. Raises: ConfigError when it is empty."""
    lengths = np.array(list(pairs), dtype=np.int64).reshape(-1, 2)
    if not len(lengths):
        raise ConfigError(f"{name} holds no request with input and output")
    prompts: Int64s = np.maximum(lengths[:, 0], 2)
    nobody = np.full(len(lengths), -1, dtype=np.int64)
    return Trace(name, prompts, lengths[:, 1], nobody, np.zeros(0, dtype=np.int64), has_known_outputs=has_known_outputs)


def load_openvid(path: Path, count_tokens: CountTokens, *, mean_tokens: int = VIDEO_MEAN_TOKENS) -> Trace:
    """OpenVid csv (columns caption, frame): 256 tokens per frame, scaled to the mean; the lengths are known
    beforehand."""
    reader = csv.DictReader(_csv_lines(path))
    _require(path, reader.fieldnames, ("caption", "frame"))
    rows = [(count_tokens(row["caption"]), _number(path, line, row, "frame")) for line, row in enumerate(reader, 2)]
    frames = np.array([frames for _, frames in rows], dtype=np.float64) * VIDEO_TOKENS_PER_FRAME
    scale = mean_tokens / frames.mean() if len(frames) else 1.0
    outputs = np.maximum(1, np.rint(frames * scale)).astype(int).tolist()
    pairs = zip((tokens for tokens, _ in rows), outputs, strict=True)
    return lengths_trace(path.stem, pairs, has_known_outputs=True)


def load_sharegpt(path: Path) -> Iterator[TextRequest]:
    """ShareGPT json: the first human turn and the answer to it, of every conversation that has both."""
    for record in _records(path):
        turns = record.get("conversations")
        if isinstance(turns, list) and len(turns) >= 2:
            first, second = turns[0], turns[1]
            if first.get("from") in ("human", "user") and second.get("from") in ("gpt", "chatgpt", "bing", "bard"):
                yield TextRequest(str(first.get("value", "")), str(second.get("value", "")))


def load_chats(path: Path) -> Iterator[TextRequest]:
    """WildChat or LMSYS-Chat json or jsonl: the first user turn and the answer to it."""
    for record in _records(path):
        turns = record.get("conversation")
        if isinstance(turns, list) and len(turns) >= 2:
            first, second = turns[0], turns[1]
            if first.get("role") == "user" and second.get("role") == "assistant":
                yield TextRequest(str(first.get("content", "")), str(second.get("content", "")))


def load_mmlu(directory: Path, *, num_shots: int = 5) -> Iterator[TextRequest]:
    """MMLU as published (dev/SUBJECT_dev.csv, test/SUBJECT_test.csv): few-shot prompts, the subject's examples
    first."""
    tests = sorted((directory / "test").glob("*_test.csv"))
    if not tests:
        raise ConfigError(f"{directory} has no test/*_test.csv; unpack the MMLU archive there")
    for path in tests:
        subject = path.name.removesuffix("_test.csv")
        examples = _mmlu_rows(directory / "dev" / f"{subject}_dev.csv")[:num_shots]
        topic = subject.replace("_", " ")
        header = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        prefix = header + "".join(f"{_mmlu_question(row)} {row[5]}\n\n" for row in examples)
        for row in _mmlu_rows(path):
            yield TextRequest(prefix + _mmlu_question(row), f" {row[5]}")


def _mmlu_question(row: list[str]) -> str:
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row[1:5], strict=True))
    return f"{row[0]}{choices}\nAnswer:"


def _mmlu_rows(path: Path) -> list[list[str]]:
    rows = list(csv.reader(_csv_lines(path)))
    for number, row in enumerate(rows, start=1):
        if len(row) != 6:
            raise ConfigError(f"{path} row {number} has {len(row)} fields; question, four choices and answer are 6")
    return rows


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a json array or of json lines. Raises: ConfigError naming the line that is not json."""
    text = _read(path)
    if text.lstrip().startswith("["):
        yield from _parse(path, 1, text)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _parse(path, number, line)


def _parse(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} line {number} is not json: {error}") from error


def _number(path: Path, line: int, row: dict[str, str], column: str) -> int:
    try:
        return int(float(row[column]))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} line {line}: {column} is {row[column]!r}, not a number") from error


def _require(path: Path, columns: Iterable[str] | None, needed: tuple[str, ...]) -> None:
    missing = set(needed) - set(columns or ())
    if missing:
        raise ConfigError(f"{path} lacks the columns {', '.join(sorted(missing))}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _csv_lines(path: Path) -> io.StringIO:
    """Csv text with its own line ends: quoted fields may hold them."""
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    return io.StringIO(_read(path), newline="")

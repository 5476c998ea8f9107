"""Blended batch files: requests that burn compute and requests that burn memory bandwidth, as OpenAI Batch lines.

Three kinds of request are mixed: few-shot questions (MMLU, 5 solved questions a subject: long shared prefixes, short
answers), long generations from short prompts, and long inputs that share nothing. Every length is fixed (end of
sequence ignored), so that all engines and all orders make the same tokens.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blendserve.host import cache_dir
from blendserve.models.hub import DEFAULT_MODEL, resolve
from blendserve.models.load import load_model
from blendserve.request import TokenIds

LETTERS = "ABCD"
TOPICS = ("a lighthouse", "the first snow", "a lost key", "the night train", "an old map", "a bridge", "the harvest")
ANSWER_TOKENS = 2
SUMMARY_TOKENS = 16
QUESTIONS_PER_SUBJECT = 8
MAX_INPUT_WORDS = 900  # about 1300 tokens of shuffled question text


@dataclass(frozen=True, slots=True)
class Mix:
    """How many requests of each kind, and in which order the file holds them.

    `is_grouped`: one kind after the other, as when data sets are put end to end; else shuffled.
    """

    name: str
    num_questions: int
    num_generations: int
    generation_tokens: int
    num_inputs: int
    is_grouped: bool

    def scaled(self, scale: float) -> Mix:
        def part(count: int) -> int:
            return max(1, round(count * scale)) if count else 0

        return Mix(
            self.name,
            part(self.num_questions),
            part(self.num_generations),
            self.generation_tokens,
            part(self.num_inputs),
            self.is_grouped,
        )


MIXES = (
    Mix("exam", num_questions=456, num_generations=220, generation_tokens=320, num_inputs=0, is_grouped=True),
    Mix("digest", num_questions=0, num_generations=220, generation_tokens=320, num_inputs=56, is_grouped=True),
    Mix("all", num_questions=304, num_generations=180, generation_tokens=320, num_inputs=28, is_grouped=False),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One request: its text or its token ids, and how many tokens it is answered with."""

    prompt: str | list[int]
    output_tokens: int


def build(mix: Mix, questions: Path, seed: int = 0) -> list[Line]:
    """The lines of a mix. `questions` holds a JSON object a line: subject, split (dev, test), question, choices,
    answer. Generations vary evenly by half of their mean length either way."""
    source = random.Random(f"{mix.name} {seed}")
    rows = [json.loads(text) for text in questions.read_text().splitlines()]
    asked = [Line(prompt, ANSWER_TOKENS) for prompt in _few_shot(rows, mix.num_questions)]
    words = [word for row in rows for word in row["question"].split()]
    inputs = [
        Line(f"Text {i}: {' '.join(source.choices(words, k=MAX_INPUT_WORDS))}\nSummary:", SUMMARY_TOKENS)
        for i in range(mix.num_inputs)
    ]
    generations = [
        Line(
            f"Story {i}, about {TOPICS[i % len(TOPICS)]}:",
            max(1, round(mix.generation_tokens * source.uniform(0.5, 1.5))),
        )
        for i in range(mix.num_generations)
    ]
    lines = [*asked, *inputs, *generations]
    if not mix.is_grouped:
        source.shuffle(lines)
    return lines


def write_batch_file(lines: Sequence[Line], path: Path) -> None:
    """The lines as an OpenAI Batch file for the completions endpoint."""
    with path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(lines):
            body = {
                "model": "any",
                "prompt": line.prompt,
                "max_tokens": line.output_tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
            request = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(request) + "\n")


def encode(lines: Sequence[Line]) -> list[TokenIds]:
    """The prompts as the default model's tokens."""
    texts = [line.prompt for line in lines if isinstance(line.prompt, str)]
    encoded = iter(load_model(resolve(None, cache_dir())).tokenizer.encode_batch(texts) if texts else [])
    return [next(encoded) if isinstance(line.prompt, str) else np.array(line.prompt, dtype=np.int32) for line in lines]


def title(mix: Mix, lines: Sequence[Line], prompts: Sequence[TokenIds]) -> str:
    order = "one kind after the other" if mix.is_grouped else "shuffled"
    return (
        f"{mix.name}: {len(lines)} requests ({order}), {sum(map(len, prompts))} prompt tokens, "
        f"{sum(line.output_tokens for line in lines)} output tokens"
    )


def run_batch_file(batch_file: Path, options: Sequence[str]) -> dict[str, Any]:
    """`blendserve run` as a process of its own; returns what `--json` prints. All lines must have been answered."""
    command = [sys.executable, "-m", "blendserve", "run", str(batch_file), "-o", f"{batch_file}.out", "--fresh"]
    command += ["--json", *([] if "--model" in options else ["--model", DEFAULT_MODEL.name]), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    assert not summary["errors_by_code"], summary
    return summary


def _few_shot(rows: Sequence[dict[str, Any]], count: int) -> list[str]:
    """Prompts of five solved questions and an open one, some of every subject, subject by subject."""
    prompts: list[str] = []
    for subject in sorted({row["subject"] for row in rows}):
        own = [row for row in rows if row["subject"] == subject]
        solved = [row for row in own if row["split"] == "dev"][:5]
        head = f"Questions about {subject.replace('_', ' ')}.\n\n"
        head += "".join(_question(row, str(row["answer"])) for row in solved)
        asked = [row for row in own if row["split"] == "test"][:QUESTIONS_PER_SUBJECT]
        prompts += [head + _question(row, "").rstrip() for row in asked]
    return prompts[:count]


def _question(row: dict[str, Any], answer: str) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question']}\n{choices}\nAnswer: {answer}\n\n"

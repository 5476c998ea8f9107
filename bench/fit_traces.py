"""Fit the tables of `simulator.workloads.fitted` from trace files and print them; the files themselves stay outside.

Usage: python bench/fit_traces.py DIRECTORY, which holds the csv files (input_tokens, output_tokens) and the MMLU
questions named below. What is printed are statistics: quantiles, one correlation per trace, and per MMLU subject
the number of questions, the tokens of its five-shot prefix and the quartiles of what follows it.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PROBABILITIES = (
    *(0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85),
    *(0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 1),
)
MAX_CONTEXT = 8192  # Llama-3-8B's; what is longer is cut to it
TRACES = {
    # name: file, scale of inputs and of outputs to Llama-3 tokens
    "SHAREGPT": ("sharegpt_llama2_tokens.csv", 0.817, 0.801),
    "AZURE_CODE": ("azure_code_2023.csv", 1.0, 1.0),
    "BURSTGPT_API": ("burstgpt_api_bursts.csv", 1.0, 1.0),
    "BURSTGPT_CONVERSATION": ("burstgpt_head_conv.csv", 1.0, 1.0),
}
MMLU_SHARING = 0.868  # Table 4: 0.86, which remains of this with whole blocks and six quantiles per subject
# Test questions per subject as published, alphabetical; the file's counts are within a few of them.
MMLU_COUNTS = (
    100,
    135,
    152,
    100,
    265,
    144,
    100,
    100,
    100,
    173,
    102,
    100,
    235,
    114,
    145,
    378,
    126,
    100,
    310,
    203,
    100,
    165,
    198,
    193,
    390,
    270,
    238,
    151,
    545,
    216,
    204,
    237,
    223,
    131,
    121,
    108,
    163,
    112,
    103,
    234,
    100,
    783,
    346,
    895,
    306,
    311,
    324,
    282,
    1534,
    272,
    612,
    110,
    245,
    201,
    100,
    166,
    171,
)
Floats = NDArray[np.float64]


def read_lengths(path: Path) -> Floats:
    """Shapes: float64[2, rows], inputs and outputs."""
    return np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.float64).T


def copula_correlation(lengths: Floats) -> float:
    """The Gaussian copula's correlation at which the mean product of both lengths is the trace's: what memory time
    needs."""
    rng = np.random.default_rng(0)
    first, independent = rng.standard_normal((2, 200_000))
    probabilities = (np.arange(len(first)) + 0.5) / len(first)
    values = [np.interp(probabilities, PROBABILITIES, np.quantile(column, PROBABILITIES)) for column in lengths]
    prompts = values[0][np.argsort(np.argsort(first))]
    wanted = float((lengths[0] * lengths[1]).mean())
    low, high = -0.99, 0.99
    while high - low > 1e-3:
        middle = (low + high) / 2
        second = middle * first + np.sqrt(1 - middle**2) * independent
        product = float((prompts * values[1][np.argsort(np.argsort(second))]).mean())
        low, high = (middle, high) if product < wanted else (low, middle)
    return low


def quantiles(values: Floats) -> str:
    """A row of the table, with enough digits for token counts."""
    return ", ".join(f"{value:.0f}" for value in np.quantile(values, PROBABILITIES))


def print_trace(name: str, lengths: Floats) -> None:
    """One fitted trace as a Python expression."""
    lengths = np.minimum(lengths, MAX_CONTEXT)
    print(f"{name} = LengthFit(")
    print(f"    prompt_quantiles=({quantiles(lengths[0])}),")
    print(f"    output_quantiles=({quantiles(lengths[1])}),")
    print(f"    correlation={copula_correlation(lengths):.3f},\n)")


def mmlu_question(row: dict[str, object], *, with_answer: bool) -> str:
    """One question as the five-shot prompt writes it."""
    choices = row["choices"]
    assert isinstance(choices, list)
    lines = [str(row["question"])] + [f"{letter}. {text}" for letter, text in zip("ABCD", choices, strict=True)]
    return "\n".join(lines) + "\nAnswer:" + (f" {row['answer']}\n\n" if with_answer else "")


def mmlu_prefix_shares(path: Path) -> dict[str, float]:
    """Share of a median prompt's characters that is the subject's five-shot prefix; subjects in file order."""
    prefixes: dict[str, int] = defaultdict(int)
    questions: dict[str, list[int]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["split"] == "dev":
            prefixes[row["subject"]] += len(mmlu_question(row, with_answer=True))
        else:
            questions[row["subject"]].append(len(mmlu_question(row, with_answer=False)))
    header = len("The following are multiple choice questions (with answers) about .\n\n")
    shares = {}
    for subject, num_characters in prefixes.items():
        prefix = num_characters + header + len(subject)
        shares[subject] = prefix / (prefix + float(np.median(questions[subject])))
    return shares


def split_subjects(prompts: Floats, expected: tuple[int, ...], slack: int = 12) -> list[int]:
    """Boundaries of the subjects in a file sorted by subject: the cut into segments of least spread.

    Dynamic programming over the log of each segment's variance; segment sizes are within `slack` of the expected
    counts.
    """
    prefix_sum = np.concatenate([[0.0], np.cumsum(prompts)])
    prefix_square = np.concatenate([[0.0], np.cumsum(prompts**2)])
    best = {0: (0.0, [0])}
    for count in expected:
        previous, best = best, {}
        for start, (cost_before, boundaries) in previous.items():
            for end in range(start + count - slack, min(start + count + slack, len(prompts)) + 1):
                mean = (prefix_sum[end] - prefix_sum[start]) / (end - start)
                variance = (prefix_square[end] - prefix_square[start]) / (end - start) - mean**2
                cost = cost_before + (end - start) * float(np.log(variance + 25))
                if end not in best or cost < best[end][0]:
                    best[end] = (cost, [*boundaries, end])
    return best[len(prompts)][1]


def print_mmlu(directory: Path) -> None:
    """The subjects of MMLU as (questions, prefix tokens, quartiles of the rest).

    Characters say which share of a prompt is prefix, up to one factor for the tokens per character of examples and
    questions; it is chosen for the published sharing.
    """
    prompts = read_lengths(directory / "mmlu_5shot.csv")[0]
    shares = mmlu_prefix_shares(directory / "mmlu_questions.jsonl")
    boundaries = split_subjects(prompts, MMLU_COUNTS)
    segments = [prompts[begin:end] for begin, end in pairwise(boundaries)]
    medians = np.array([np.median(segment) for segment in segments])
    counts = np.array([len(segment) for segment in segments])
    rest_by_median = medians * (1 - np.array(list(shares.values())))
    rest_scale = (prompts.sum() * (1 - MMLU_SHARING) - (counts * (prompts.sum() / counts.sum() - medians)).sum()) / (
        counts * rest_by_median
    ).sum()
    print(f"MMLU_SUBJECTS = (  # tokens of questions per character: {rest_scale:.3f} of the examples'")
    for subject, segment, median, rest in zip(shares, segments, medians, rest_by_median, strict=True):
        prefix = int(min(median - rest * rest_scale, segment.min() - 2))
        quartiles = ", ".join(f"{value:.0f}" for value in np.quantile(segment - prefix, (0, 0.25, 0.5, 0.75, 0.95, 1)))
        print(f"    SubjectFit({len(segment)}, {prefix}, ({quartiles})),  # {subject}")
    print(")")


def main() -> None:
    directory = Path(sys.argv[1])
    print(f"PROBABILITIES = {PROBABILITIES}")
    for name, (file, prompt_scale, output_scale) in TRACES.items():
        print_trace(name, read_lengths(directory / file) * [[prompt_scale], [output_scale]])
    print_mmlu(directory)


if __name__ == "__main__":
    main()

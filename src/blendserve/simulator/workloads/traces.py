"""Synthetic single-kind traces that need no file, drawn from fitted statistics (paper section 8, Table 4).

Lengths are stratified: a trace of n requests takes the quantiles (i + 1/2) / n in random order, so that its means
hardly depend on the seed. What no fit decides is stated at each trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from blendserve.config import BLOCK_SIZE
from blendserve.errors import ConfigError
from blendserve.simulator.workloads.fitted import (
    AZURE_CODE,
    BURSTGPT_API,
    BURSTGPT_CONVERSATION,
    MMLU_SUBJECTS,
    PROBABILITIES,
    SHAREGPT,
    SUBJECT_PROBABILITIES,
    LengthFit,
)

Int64s = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests of one kind, without tokens.

    Shapes: `num_prompt_tokens`, `num_output_tokens`, `prefix` int64[n]; `prefix_tokens` int64[num_prefixes]. Request i
    begins with the prefix_tokens[prefix[i]] tokens that all requests of that prefix share (-1: none) and shares
    `num_system_tokens` with the whole trace. Prompts are longer than their prefixes. `has_known_outputs`: lengths are
    fixed by the request itself, as in video generation.
    """

    name: str
    num_prompt_tokens: Int64s
    num_output_tokens: Int64s
    prefix: Int64s
    prefix_tokens: Int64s
    num_system_tokens: int = 1
    has_known_outputs: bool = False

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)

    def __post_init__(self) -> None:
        assert len(self.num_prompt_tokens) == len(self.num_output_tokens) == len(self.prefix)
        own = np.append(self.prefix_tokens, self.num_system_tokens)[self.prefix]
        assert (own < self.num_prompt_tokens).all(), "a prompt ends inside its prefix"


Generator = Callable[[int, np.random.Generator], Trace]


def sharegpt(num_requests: int, rng: np.random.Generator) -> Trace:
    """Chat: fitted lengths; a third of the requests carry a 16-token system prompt (sharing 0.02)."""
    return _fitted("sharegpt", SHAREGPT, num_requests, rng, prefix_tokens=16, prefix_share=0.30)


def azure_code(num_requests: int, rng: np.random.Generator) -> Trace:
    """Code completion: fitted lengths; two thirds of the requests carry a 32-token system prompt (sharing 0.01)."""
    return _fitted("azure-code", AZURE_CODE, num_requests, rng, prefix_tokens=32, prefix_share=0.64)


BURSTGPT_API_SHARE = 0.97
"""API-log rows among all: the mixture with the conversation log that has the paper's density of 17.78."""


def burstgpt(num_requests: int, rng: np.random.Generator) -> Trace:
    """API calls with a few conversations; a quarter of the requests carry a 16-token system prompt (sharing 0.02)."""
    num_api = round(num_requests * BURSTGPT_API_SHARE)
    parts = [_lengths(BURSTGPT_API, num_api, rng), _lengths(BURSTGPT_CONVERSATION, num_requests - num_api, rng)]
    prompts, outputs = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = rng.permutation(num_requests)
    return _with_prefix("burstgpt", prompts[order], outputs[order], rng, prefix_tokens=16, prefix_share=0.24)


def mmlu(num_requests: int, rng: np.random.Generator) -> Trace:
    """Five-shot questions of 57 subjects, each with its own prefix (to whole blocks); the answer is two tokens
    (assumed)."""
    subject = _stratified_choice(np.array([fit.num_questions for fit in MMLU_SUBJECTS]), num_requests, rng)
    rest = np.zeros(num_requests, dtype=np.int64)
    for index, fit in enumerate(MMLU_SUBJECTS):
        rows = np.flatnonzero(subject == index)
        ranks = (rng.permutation(len(rows)) + 0.5) / max(1, len(rows))
        rest[rows] = np.rint(np.interp(ranks, SUBJECT_PROBABILITIES, fit.question_quantiles))
    prefix_tokens = np.array([round_to_block(fit.num_prefix_tokens) for fit in MMLU_SUBJECTS], dtype=np.int64)
    prompts = prefix_tokens[subject] + np.maximum(rest, 2)
    return Trace("mmlu", prompts, np.full(num_requests, 2, dtype=np.int64), subject, prefix_tokens)


VIDEO_MEAN_TOKENS = 16384
VIDEO_PROMPT_TOKENS = 64


def openvid(num_requests: int, rng: np.random.Generator, *, mean_tokens: float = VIDEO_MEAN_TOKENS) -> Trace:
    """Video generation: known outputs, lognormal with mean 16384 and coefficient of variation 1; prompts of 64 tokens
    (assumed)."""
    outputs = _lognormal(mean_tokens, 1.0, _strata(rng.standard_normal(num_requests)))
    prompts = np.full(num_requests, VIDEO_PROMPT_TOKENS, dtype=np.int64)
    nobody = np.full(num_requests, -1, dtype=np.int64)
    return Trace("openvid", prompts, outputs, nobody, np.zeros(0, dtype=np.int64), has_known_outputs=True)


WILDCHAT_TEMPLATES = tuple(BLOCK_SIZE * blocks for blocks in (4, 8, 16, 32, 64, 128))
WILDCHAT_TEMPLATE_SHARE = 0.288
WILDCHAT_CORRELATION = 0.44


def wildchat(num_requests: int, rng: np.random.Generator) -> Trace:
    """Chat with repeated templates: a stand-in, not a fit. It has the three published numbers: outputs of mean 256,
    sharing 0.19 and density 2.13.

    Assumed: lognormal prompts of mean 300 and cv 2, outputs of cv 1, correlated; a share of the requests begins with
    one of eight templates of the largest length that fits.
    """
    first, second = rng.standard_normal((2, num_requests))
    second = WILDCHAT_CORRELATION * first + math.sqrt(1 - WILDCHAT_CORRELATION**2) * second
    prompts = np.maximum(_lognormal(300, 2.0, _strata(first)), 2)
    outputs = _lognormal(256, 1.0, _strata(second))
    size = np.searchsorted(np.array(WILDCHAT_TEMPLATES), prompts) - 1
    has_template = (rng.random(num_requests) < WILDCHAT_TEMPLATE_SHARE) & (size >= 0)
    prefix = np.where(has_template, size * 8 + rng.integers(0, 8, num_requests), -1)
    return Trace("wildchat", prompts, outputs, prefix, np.repeat(np.array(WILDCHAT_TEMPLATES, dtype=np.int64), 8))


TRACE_BY_NAME: dict[str, Generator] = {
    "sharegpt": sharegpt,
    "wildchat": wildchat,
    "azure-code": azure_code,
    "openvid": openvid,
    "burstgpt": burstgpt,
    "mmlu": mmlu,
}


def make_trace(name: str, num_requests: int, rng: np.random.Generator) -> Trace:
    """A trace by name. Raises: ConfigError with the names that exist, or when no request is asked for."""
    if name not in TRACE_BY_NAME:
        raise ConfigError(f"unknown trace {name!r}; known: {', '.join(TRACE_BY_NAME)}")
    if num_requests < 1:
        raise ConfigError(f"a trace of {num_requests} requests; it needs at least 1")
    return TRACE_BY_NAME[name](num_requests, rng)


def round_to_block(num_tokens: int) -> int:
    """The nearest whole number of KV blocks, at least one: a prefix that the engine can share to its end."""
    return max(1, round(num_tokens / BLOCK_SIZE)) * BLOCK_SIZE


def _fitted(
    name: str, fit: LengthFit, num_requests: int, rng: np.random.Generator, *, prefix_tokens: int, prefix_share: float
) -> Trace:
    prompts, outputs = _lengths(fit, num_requests, rng)
    return _with_prefix(name, prompts, outputs, rng, prefix_tokens=prefix_tokens, prefix_share=prefix_share)


def _with_prefix(
    name: str,
    prompts: Int64s,
    outputs: Int64s,
    rng: np.random.Generator,
    *,
    prefix_tokens: int,
    prefix_share: float,
) -> Trace:
    """One prefix in front of a share of the prompts, its tokens added to theirs."""
    has_prefix = _strata(rng.standard_normal(len(prompts))) < prefix_share
    prompts = np.maximum(prompts, 2) + prefix_tokens * has_prefix
    return Trace(name, prompts, outputs, np.where(has_prefix, 0, -1), np.array([prefix_tokens], dtype=np.int64))


def _lengths(fit: LengthFit, num_requests: int, rng: np.random.Generator) -> tuple[Int64s, Int64s]:
    """Stratified inputs and outputs joined by a Gaussian copula of the fitted correlation."""
    first, second = rng.standard_normal((2, num_requests))
    second = fit.correlation * first + math.sqrt(1 - fit.correlation**2) * second
    prompts = np.interp(_strata(first), PROBABILITIES, fit.prompt_quantiles)
    outputs = np.interp(_strata(second), PROBABILITIES, fit.output_quantiles)
    return np.rint(prompts).astype(np.int64), np.maximum(1, np.rint(outputs)).astype(np.int64)


def _strata(values: Floats) -> Floats:
    """Replace n values by the probabilities (rank + 1/2) / n."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return (ranks + 0.5) / max(1, len(values))


def _lognormal(mean: float, variation: float, probabilities: Floats) -> Int64s:
    sigma = math.sqrt(math.log1p(variation**2))
    normal = NormalDist(math.log(mean) - sigma**2 / 2, sigma)
    values = np.exp([normal.inv_cdf(probability) for probability in probabilities.tolist()])
    return np.maximum(1, np.rint(values)).astype(np.int64)


def _stratified_choice(weights: Int64s, num_requests: int, rng: np.random.Generator) -> Int64s:
    """Indices in proportion to their weights, in random order."""
    edges = np.cumsum(weights) / weights.sum()
    return np.searchsorted(edges, (rng.permutation(num_requests) + 0.5) / num_requests).astype(np.int64)

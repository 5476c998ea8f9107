"""How a token is chosen from a row of logits: the rule that every executor with real logits follows.

In this order: -infinity for tokens that a grammar's mask leaves out; only allowed tokens; no bad word completed; logit
bias; no end token before `min_tokens`; repetition, then frequency and presence penalties; at temperature 0 the largest
logit wins (the lowest id among equals). Otherwise logits / temperature are filtered by min_p, top_k and top_p and the
token is drawn by inverse CDF in token-id order with
u = (word 0 of Philox4x32-10, key = seed, counter = output position) >> 8, times 2^-24.
So a token depends on its request's seed, its position and the logits, never on the batch. csrc/ops/sample is its twin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from blendserve.errors import ExecutorError
from blendserve.request import Request, SamplingParams, TokenLogprob

Doubles = NDArray[np.float64]
TokenIds = NDArray[np.int32]
BadWordLookup = Callable[[tuple[str, ...]], Sequence[tuple[int, ...]]]
"""From words to their token sequences."""

_MASK = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10


def philox4x32(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words of a key and a counter. Source: Salmon et al., SC 2011."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = _PHILOX_MULTIPLIERS[0] * c0, _PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & _MASK, (product0 >> 32) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK, (k1 + _PHILOX_WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, output_position: int) -> float:
    """The random number in [0, 1) of one output position (0 is the first generated token) of one request.

    The key is the seed's low and high word (two's complement); the counter is the position's low and high word, 0, 0.
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    word = philox4x32(key, (output_position & _MASK, (output_position >> 32) & _MASK, 0, 0))[0]
    return (word >> 8) * 2.0**-24


def no_bad_words(words: tuple[str, ...]) -> Sequence[tuple[int, ...]]:
    """For executors without a tokenizer. Raises: ExecutorError where words are given."""
    if words:
        raise ExecutorError("bad_words need the model's tokenizer, which this executor was not given")
    return ()


def sample(
    logits: Doubles,
    request: Request,
    output_ids: TokenIds,
    eos_token_ids: tuple[int, ...],
    bad_words: Sequence[Sequence[int]] = (),
) -> int:
    """The next token of a request that has generated `output_ids` so far. Shapes: `logits` [vocab_size], unchanged."""
    params = request.sampling
    adjusted = adjust(logits, request, output_ids, eos_token_ids, bad_words)
    if not np.isfinite(adjusted).any():  # only what must not end it may come: the grammar decides
        return int(np.flatnonzero(np.isfinite(logits))[0])
    if params.temperature == 0.0:
        return int(np.argmax(adjusted))
    scaled = adjusted / params.temperature
    weights = np.where(is_kept(scaled, params), np.exp(scaled - scaled.max()), 0.0)
    cumulative = np.cumsum(weights)
    token = int(np.searchsorted(cumulative, uniform(request.seed, len(output_ids)) * cumulative[-1], side="right"))
    return min(token, int(np.flatnonzero(weights)[-1]))  # rounding may place u * total at the very end


def adjust(
    logits: Doubles,
    request: Request,
    output_ids: TokenIds,
    eos_token_ids: tuple[int, ...],
    bad_words: Sequence[Sequence[int]] = (),
) -> Doubles:
    """Logits after allowed tokens, bad words, bias, minimum length and penalties, as a new array."""
    params = request.sampling
    adjusted = np.array(logits, dtype=np.float64)
    if params.allowed_token_ids is not None:
        adjusted[np.setdiff1d(np.arange(len(adjusted)), params.allowed_token_ids)] = -np.inf
    for *before, last in bad_words:
        if len(before) <= len(output_ids) and before == output_ids[len(output_ids) - len(before) :].tolist():
            adjusted[last] = -np.inf
    for token, bias in params.logit_bias.items():
        adjusted[token] += bias
    if len(output_ids) < params.min_tokens:
        adjusted[[*params.stop_token_ids, *eos_token_ids]] = -np.inf
    if params.repetition_penalty != 1.0:
        seen = np.union1d(request.prompt_token_ids, output_ids)
        penalty = params.repetition_penalty
        adjusted[seen] = np.where(adjusted[seen] > 0, adjusted[seen] / penalty, adjusted[seen] * penalty)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        tokens, counts = np.unique(output_ids, return_counts=True)
        adjusted[tokens] -= params.frequency_penalty * counts + params.presence_penalty
    return adjusted


def is_kept(scaled: Doubles, params: SamplingParams) -> NDArray[np.bool_]:
    """Which tokens may be drawn: min_p against the best, then the top_k best, then the least set holding top_p.

    Among equal logits the lower id ranks first. The best token is always kept.
    """
    kept = np.isfinite(scaled)
    if params.min_p > 0.0:
        kept &= scaled >= scaled.max() + np.log(params.min_p)
    ranked = np.argsort(-scaled, kind="stable")
    ranked = ranked[kept[ranked]]
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    if params.top_p < 1.0:
        weights = np.exp(scaled[ranked] - scaled[ranked[0]])
        before = np.cumsum(weights) - weights
        ranked = ranked[before < params.top_p * weights.sum()]
    result = np.zeros(len(scaled), dtype=np.bool_)
    result[ranked] = True
    return result


def masked(logits: Doubles, words: NDArray[np.int32]) -> Doubles:
    """Logits with -infinity for the tokens whose bits are 0, lowest bit first. Shapes: [vocab_size], [words]."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(logits)]
    return np.where(bits != 0, logits, -np.inf)


def token_logprob(logits: Doubles, token: int, num_top: int) -> TokenLogprob:
    """Log probabilities under the model and the grammar alone: before bias, penalties, temperature, filters (as vLLM
    does). Tokens that a grammar leaves out have none.
    """
    logprobs = logits - (logits.max() + np.log(np.exp(logits - logits.max()).sum()))
    best = np.argsort(-logprobs, kind="stable")[:num_top]
    best = best[np.isfinite(logprobs[best])]
    return TokenLogprob(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best))

"""The sampling rule: known answers of the generator, filters against a plain definition, the distribution drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.executors.sampling import adjust, is_kept, philox4x32, sample, token_logprob, uniform
from blendserve.request import Request, SamplingParams

LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.0])
NONE = np.array([], dtype=np.int32)


def request_of(prompt: tuple[int, ...] = (0,), seed: int = 0, **params: Any) -> Request:
    ids = np.array(prompt, dtype=np.int32)
    return Request(0, ids, len(ids), SamplingParams(**params), 100, seed)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x00000000, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_known_answers(word: int, expected: tuple[int, ...]) -> None:
    """From kat_vectors of the authors' Random123 library."""
    assert philox4x32((word, word), (word, word, word, word)) == expected


def test_philox_known_answer_of_pi() -> None:
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32((0xA4093822, 0x299F31D0), counter) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform_uses_all_of_seed_and_position() -> None:
    draws = {uniform(seed, position) for seed in (0, 1, 2**32, 2**63, -1) for position in (0, 1, 2**32)}
    assert len(draws) == 15
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
    assert all(0.0 <= uniform(7, position) < 1.0 for position in range(1000))
    assert uniform(0, 0) == (0x6627E8D5 >> 8) * 2.0**-24


def test_only_allowed_tokens_are_left() -> None:
    adjusted = adjust(LOGITS, request_of(allowed_token_ids=(4, 0), logit_bias={3: 50.0}), NONE, ())
    assert np.flatnonzero(np.isfinite(adjusted)).tolist() == [0, 4]
    assert sample(LOGITS, request_of(temperature=0.0, allowed_token_ids=(4, 0)), NONE, ()) == 0


@pytest.mark.parametrize(
    ("output", "banned"),
    [([], [1]), ([2], [1, 3]), ([5, 2], [1, 3, 0]), ([2, 5], [1]), ([5, 2, 0, 2], [1, 3])],
)
def test_the_last_token_of_a_bad_word_is_banned_after_the_others(output: list[int], banned: list[int]) -> None:
    words = [(1,), (2, 3), (5, 2, 0)]
    adjusted = adjust(LOGITS, request_of(prompt=(2, 5)), np.array(output, np.int32), (), words)
    assert sorted(np.flatnonzero(np.isneginf(adjusted)).tolist()) == sorted(banned)


def test_greedy_takes_the_lowest_id_of_equals_and_ignores_the_seed() -> None:
    assert {sample(LOGITS, request_of(seed=seed, temperature=0.0), NONE, ()) for seed in range(5)} == {1}


def test_logits_are_not_changed() -> None:
    before = LOGITS.copy()
    params: dict[str, Any] = {
        "logit_bias": {1: 5.0},
        "repetition_penalty": 2.0,
        "frequency_penalty": 1.0,
        "min_tokens": 3,
    }
    sample(LOGITS, request_of(**params), np.array([2], np.int32), (1,))
    np.testing.assert_array_equal(LOGITS, before)


def test_penalties_and_bias() -> None:
    """Repetition looks at prompt and output, the other two at the output only."""
    output = np.array([1, 1, 4], dtype=np.int32)
    request = request_of(
        (0, 5), frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0, logit_bias={2: 1.0}
    )
    expected = [0.5, 1.5 - 1.25, 3.0, 3.0, -2.0 - 0.75, 0.0]
    np.testing.assert_allclose(adjust(LOGITS, request, output, ()), expected)


def test_no_end_token_before_min_tokens() -> None:
    request = request_of(min_tokens=2, stop_token_ids=(3,))
    for num_output, is_banned in ((1, True), (2, False)):
        adjusted = adjust(LOGITS, request, np.zeros(num_output, np.int32), (1,))
        assert np.isneginf(adjusted[[1, 3]]).all() == is_banned
    ignoring = request_of(min_tokens=2, ignore_eos=True)
    assert np.isneginf(adjust(LOGITS, ignoring, NONE, (1,))[1]), "an end that is ignored is no text either"


def kept_plainly(scaled: list[float], params: SamplingParams) -> set[int]:
    """The filters one after another, on sorted lists of (probability, id)."""
    weights = np.exp(np.array(scaled) - max(scaled))
    ranked = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    ranked = [
        token for token in ranked if scaled[token] >= max(scaled) + (np.log(params.min_p) if params.min_p else -np.inf)
    ]
    if params.top_k:
        ranked = ranked[: params.top_k]
    total, before, kept = weights[ranked].sum(), 0.0, set()
    for token in ranked:
        if before >= params.top_p * total:
            break
        kept.add(token)
        before += weights[token]
    return kept


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=12),
    st.integers(0, 13),
    st.sampled_from([1.0, 0.9, 0.5, 0.1, 1e-6]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_filters_keep_what_their_definition_keeps(logits: list[int], top_k: int, top_p: float, min_p: float) -> None:
    scaled = [logit / 2 for logit in logits]  # many ties
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    kept = set(np.flatnonzero(is_kept(np.array(scaled), params)).tolist())
    assert kept == kept_plainly(scaled, params)
    assert int(np.argmax(scaled)) in kept


def test_the_draw_follows_the_distribution() -> None:
    """Chi-squared over 20,000 positions of one seed; 5 degrees of freedom, 99.99% quantile 25.7."""
    request = request_of(seed=11, temperature=0.7)
    weights = np.exp(LOGITS / 0.7)
    probabilities = weights / weights.sum()
    bounds = np.cumsum(probabilities)
    counts = np.zeros(6)
    for position in range(20_000):
        counts[np.searchsorted(bounds, uniform(request.seed, position), side="right")] += 1
    assert ((counts - 20_000 * probabilities) ** 2 / (20_000 * probabilities)).sum() < 25.7
    for position in range(0, 200, 7):
        expected = int(np.searchsorted(bounds, uniform(request.seed, position), side="right"))
        assert sample(LOGITS, request, np.zeros(position, np.int32), ()) == expected


def test_a_filter_of_one_token_is_greedy_at_any_temperature() -> None:
    for params in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0, "top_k": 1}):
        drawn = {sample(LOGITS, request_of(seed=seed, temperature=9.0, **params), NONE, ()) for seed in range(20)}
        assert drawn == {1}


def test_banned_tokens_are_never_drawn() -> None:
    request = request_of(logit_bias={1: -np.inf, 3: -np.inf}, temperature=5.0)
    drawn = {sample(LOGITS, request_of(seed=s, **vars_of(request)), NONE, ()) for s in range(100)}
    assert drawn == {0, 2, 4, 5}


def vars_of(request: Request) -> dict[str, Any]:
    return {"logit_bias": request.sampling.logit_bias, "temperature": request.sampling.temperature}


def test_logprobs_are_the_models_own() -> None:
    result = token_logprob(LOGITS, 4, 3)
    total = np.log(np.exp(LOGITS).sum())
    assert result.token_id == 4
    assert result.logprob == pytest.approx(-1.0 - total)
    assert [token for token, _ in result.top] == [1, 3, 2]
    assert [logprob for _, logprob in result.top] == pytest.approx([3.0 - total, 3.0 - total, 2.0 - total])
    assert token_logprob(LOGITS, 4, 0).top == ()

"""The life of a batch, and which batches run next: pure parts, tested alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendserve.serve.queue import SWAP_S, Waiting, choose_round, finish_times
from blendserve.serve.records import window_seconds
from blendserve.serve.states import ENDINGS, STATUSES, can_cancel, is_ended, may_follow, resumption_of


def test_every_state_leads_to_an_end_and_ends_lead_nowhere() -> None:
    reaches = {status: {status} for status in STATUSES}
    for _ in STATUSES:
        for before, after in itertools.product(STATUSES, STATUSES):
            if may_follow(before, after):
                reaches[before] |= reaches[after]
    for status in STATUSES:
        assert reaches[status] & set(ENDINGS)
        assert is_ended(status) == (reaches[status] == {status})
    assert set(ENDINGS) == {status for status in STATUSES if is_ended(status)}


def test_only_writing_the_files_ends_a_batch_that_has_run() -> None:
    for status in ("in_progress", "cancelling"):
        assert not any(may_follow(status, ending) for ending in ENDINGS)


def test_a_restart_goes_on_with_every_state_that_is_no_end() -> None:
    for status in STATUSES:
        assert (resumption_of(status) == "nothing") == is_ended(status)
        assert not (can_cancel(status) and is_ended(status))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30m", 1800),
        ("24h", 86400),
        ("7d", 604800),
        ("0h", None),
        ("24", None),
        ("1.5h", None),
        ("400d", None),
        ("", None),
    ],
)
def test_windows(text: str, seconds: int | None) -> None:
    assert window_seconds(text) == seconds


def waiting(id: str, num_left: int = 100, *, owner: str = "", model: str = "a", deadline: float = 1e9) -> Waiting:
    return Waiting(id, owner, model, num_left, deadline, 0.0)


def choose(
    *batches: Waiting, loaded: str | None = "a", rates: Mapping[str, float] | None = None, round_s: float = 100.0
) -> tuple[str, dict[str, int | None]]:
    found = choose_round(batches, loaded=loaded, rates=rates or {}, now=0.0, round_s=round_s)
    assert found is not None
    return found.model, dict(found.max_requests)


def test_nothing_waits() -> None:
    assert choose_round([], loaded="a", rates={}, now=0.0, round_s=1.0) is None


def test_all_batches_of_a_model_are_planned_together() -> None:
    assert choose(waiting("x"), waiting("y"), waiting("z", model="b")) == ("a", {"x": None, "y": None})


def test_a_batch_that_would_be_late_goes_before_the_others() -> None:
    late = waiting("late", 100, deadline=150.0)
    assert choose(waiting("x", 1000), late, rates={"a": 1.0}) == ("a", {"late": None})
    assert choose(waiting("x", 10), late, rates={"a": 1.0}) == ("a", {"late": None, "x": None})


def test_a_batch_that_is_late_anyway_still_runs() -> None:
    assert choose(waiting("late", 100, deadline=1.0), rates={"a": 1.0})[1] == {"late": None}


def test_models_are_swapped_when_nothing_is_left_or_a_deadline_needs_it() -> None:
    here, there = waiting("x", 1000), waiting("y", 10, model="b", deadline=500.0)
    assert choose(here, there, rates={"a": 1.0, "b": 1.0})[0] == "b"
    assert choose(here, waiting("y", 10, model="b", deadline=5000.0), rates={"a": 1.0, "b": 1.0})[0] == "a"
    assert choose(here, waiting("y", 10, model="b", deadline=SWAP_S), rates={"a": 1.0, "b": 1.0})[0] == "a"
    assert choose(there, loaded="a")[0] == "b"


def test_keys_get_equal_shares_of_a_round() -> None:
    many, few = waiting("many", 10_000, owner="k1"), waiting("few", 30, owner="k2")
    model, shares = choose(many, few, rates={"a": 1.0}, round_s=100.0)
    assert (model, shares) == ("a", {"many": 70, "few": 30})
    assert choose(many, waiting("also", 10_000, owner="k2"), rates={"a": 1.0})[1] == {"many": 50, "also": 50}
    assert choose(many, rates={"a": 1.0})[1] == {"many": None}


batches = st.lists(
    st.builds(
        Waiting,
        id=st.uuids().map(str),
        owner=st.sampled_from(["", "k1", "k2", "k3"]),
        model=st.sampled_from(["a", "b", "c"]),
        num_left=st.integers(1, 10_000),
        deadline=st.floats(0, 1e5),
        created_at=st.floats(0, 1e5),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda batch: batch.id,
)


@given(batches, st.sampled_from([None, "a", "b"]), st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 1e4)))
def test_a_round_always_makes_progress(found: list[Waiting], loaded: str | None, rates: dict[str, float]) -> None:
    chosen = choose_round(found, loaded=loaded, rates=rates, now=0.0, round_s=50.0)
    assert chosen is not None
    by_id = {batch.id: batch for batch in found}
    assert chosen.max_requests
    for id, most in chosen.max_requests.items():
        assert by_id[id].model == chosen.model
        assert most is None or 1 <= most <= by_id[id].num_left


@given(batches, st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 1e4)))
def test_forecasts_are_in_the_order_of_deadlines(found: list[Waiting], rates: dict[str, float]) -> None:
    ends = finish_times(found, rates, 0.0)
    assert set(ends) == {batch.id for batch in found if batch.model in rates}
    known = sorted((batch for batch in found if batch.id in ends), key=lambda batch: batch.deadline)
    total = sum(batch.num_left / rates[batch.model] for batch in known)
    assert not known or max(ends.values()) >= total * 0.999

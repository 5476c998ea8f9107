"""Cost formulas against the paper's worked numbers and against arithmetic done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendserve.costs.model_cost import CostModel, ModelCost, partition_memory
from blendserve.errors import ConfigError
from blendserve.models.known import LLAMA_2_7B, LLAMA_3_8B, MODEL_BY_NAME, known_model

UNIT = CostModel(token_s=3.0, kv_token_s=0.5, pair_s=0.25)
LENGTHS = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), min_size=1, max_size=20)


def test_figure_6_splits_60_gb_between_the_ends() -> None:
    compute_end, memory_end = partition_memory(3.73, 0.096, 1.27, 60.0)
    assert compute_end == pytest.approx(19.3, abs=0.1)
    assert memory_end == pytest.approx(40.7, abs=0.1)
    assert 3.73 * compute_end + 0.096 * memory_end == pytest.approx(1.27 * 60)


@pytest.mark.parametrize(("root", "share"), [(9.0, 1.0), (0.01, 0.0)])
def test_an_end_that_cannot_balance_gets_all_or_nothing(root: float, share: float) -> None:
    assert partition_memory(3.0, 0.1, root, 10.0) == (10 * share, 10 * (1 - share))


def test_equal_ends_share_memory_evenly() -> None:
    assert partition_memory(1.0, 1.0, 1.0, 8.0) == (4.0, 4.0)


def test_formulas_by_hand() -> None:
    assert UNIT.compute_s(10, 4) == 3.0 * 14 + 0.25 * 100
    assert UNIT.memory_s(10, 4) == 0.5 * (10 * 4 + 4 * 4 / 2)
    assert UNIT.prefix_compute_s(6) == 3.0 * 6 + 0.25 * 36


def test_the_head_is_counted_for_output_tokens_alone() -> None:
    with_head = CostModel(token_s=3.0, kv_token_s=0.5, pair_s=0.25, head_s=2.0)
    assert with_head.compute_s(10, 4) == UNIT.compute_s(10, 4) + 2.0 * 4
    assert with_head.prefix_compute_s(6) == UNIT.prefix_compute_s(6)
    assert with_head.decode_s == 5.0
    batch = with_head.steady_batch(10, 4, 120)
    assert batch.compute_s == pytest.approx(10 * 5.0 + 25 * 3.0 + 25 * 10 * 0.25)
    with pytest.raises(ConfigError, match="must be above 0"):
        CostModel(token_s=3.0, kv_token_s=0.5, head_s=-1.0)


def test_peak_rates_follow_the_papers_formula() -> None:
    model = ModelCost.from_spec(LLAMA_3_8B)
    cost = CostModel.at_rates(model, flop_per_s=312e12, bytes_per_s=2.039e12, has_prefill_attention=True)
    p, d = 1000, 200
    flop = 2 * (p + d) * 8.03e9 + 4 * p**2 * 4096 * 32
    assert cost.compute_s(p, d) == pytest.approx(flop / 312e12, rel=1e-4)
    assert cost.memory_s(p, d) == pytest.approx((p * d + d * d / 2) * 1024 * 32 * 4 / 2.039e12)


def test_a_request_that_decodes_nothing_is_infinitely_dense() -> None:
    density = UNIT.density([10, 10], [0, 5])
    assert density[0] == np.inf
    assert density[1] == UNIT.compute_s(10, 5) / UNIT.memory_s(10, 5)


@given(LENGTHS)
def test_totals_are_the_sums_over_requests(lengths: list[tuple[int, int]]) -> None:
    prompts, outputs = zip(*lengths, strict=True)
    saved = [p // 3 for p in prompts]
    total = UNIT.total(prompts, outputs, saved)
    assert total.compute_s == pytest.approx(sum(UNIT.compute_s(p, d) for p, d in lengths))
    assert total.memory_s == pytest.approx(sum(UNIT.memory_s(p, d) for p, d in lengths))
    assert total.saved_s == pytest.approx(sum(UNIT.prefix_compute_s(s) for s in saved))
    if total.compute_s and total.memory_s:
        assert total.density == pytest.approx((1 - total.sharing) * total.compute_s / total.memory_s)


def test_batch_density_converges_to_the_requests() -> None:
    """Paper section 4: with many equal requests the batch has their density (each prefill token counted with its
    decodes)."""
    cost = CostModel(token_s=50e-6, kv_token_s=80e-9)
    p, d = 800.0, 100.0
    batch = cost.steady_batch(p, d, capacity_tokens=457_000)
    assert batch.density == pytest.approx(cost.compute_s(p, d) / cost.memory_s(p, d))
    assert batch.num_prefill_tokens / batch.num_decode_tokens == pytest.approx(p / d)


def test_a_steady_batch_needs_decodes() -> None:
    with pytest.raises(ConfigError, match="answers have 0 tokens"):
        UNIT.steady_batch(10, 0, 100)


def test_attention_variants_change_memory_only() -> None:
    grouped, full = ModelCost.from_spec(LLAMA_3_8B), ModelCost.from_spec(LLAMA_2_7B)
    latent = grouped.with_latent_kv(512, 64)
    assert grouped.kv_bytes_per_token == 2 * 32 * 1024 * 2
    assert full.kv_bytes_per_token == 2 * 32 * 4096 * 2
    assert latent.kv_bytes_per_token == 32 * 576 * 2
    assert latent.num_parameters == grouped.num_parameters


def test_dtype_widths_scale_bytes() -> None:
    narrow = ModelCost.from_spec(LLAMA_3_8B, bytes_per_weight=1, kv_dtype="int8")
    wide = ModelCost.from_spec(LLAMA_3_8B)
    assert wide.kv_bytes_per_token * (128 + 2) == 2 * 128 * narrow.kv_bytes_per_token  # a scale of two bytes per head
    assert wide.weight_bytes == 2 * narrow.weight_bytes


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.6),
        ("qwen-2.5-7b", 7.62),
        ("qwen-2.5-72b", 72.7),
        ("llama-2-7b", 6.74),
        ("deepseek-67b", 67.4),
        ("smollm2-135m", 0.1345),
    ],
)
def test_known_models_have_their_published_size(name: str, billions: float) -> None:
    assert known_model(name).num_parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="smollm2-135m"):
        known_model("gpt-9")
    assert all(name == spec.name for name, spec in MODEL_BY_NAME.items())


@pytest.mark.parametrize("rates", [(0.0, 1.0, 0.0), (1.0, -1.0, 0.0), (1.0, 1.0, -0.1)])
def test_rates_must_be_positive(rates: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        CostModel(*rates)

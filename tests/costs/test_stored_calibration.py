"""Calibration files, what is refused, and the times that come of measured rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from calibration_cases import CALIBRATION

from blendserve.config import DTYPES, KV_DTYPES
from blendserve.costs.hardware import A100_80G
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import PERFECT, SEQUENTIAL, Interference, gpu_step_cost
from blendserve.costs.stored_calibration import Calibration, load_calibration
from blendserve.errors import ConfigError
from blendserve.models.known import LLAMA_3_8B, SMOLLM2_135M

MODEL = ModelCost.from_spec(LLAMA_3_8B)


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    path = CALIBRATION.save(tmp_path / "deep" / "cache")
    assert path.name == "calibration.json"
    assert load_calibration(tmp_path / "deep" / "cache") == CALIBRATION


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1}', CALIBRATION.to_json().replace('"version": 5', '"version": 4')]
)
def test_a_bad_calibration_asks_for_a_new_one(text: str) -> None:
    with pytest.raises(ConfigError, match="blendserve calibrate"):
        Calibration.from_json(text)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_that_cannot_be_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="not above 0; run `blendserve calibrate`"):
        replace(CALIBRATION, kv_bytes_per_s=rate)
    with pytest.raises(ConfigError, match="not above 0; run `blendserve calibrate`"):
        replace(CALIBRATION, gemm_points=((1, rate),))


@pytest.mark.parametrize(
    "wrong", [{"iteration_bytes": 0}, {"iteration_bytes": 129}, {"chunk_bytes": -1}, {"memory_lanes": -1}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"iteration_bytes.*calibrate"):
        replace(CALIBRATION, **wrong)  # type: ignore[arg-type]


def test_a_calibration_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        CALIBRATION.save(tmp_path / "file")


def test_each_pair_of_dtypes_has_a_file_of_its_own(tmp_path: Path) -> None:
    stored = [replace(CALIBRATION, dtype=dtype, kv_dtype=kv_dtype) for dtype in DTYPES for kv_dtype in KV_DTYPES]
    paths = [calibration.save(tmp_path) for calibration in stored]
    assert len(set(paths)) == 4
    for calibration in stored:
        assert load_calibration(tmp_path, calibration.dtype, calibration.kv_dtype) == calibration
    paths[0].write_text(stored[1].to_json())
    with pytest.raises(ConfigError, match="for --dtype bf16 --kv-dtype int8, not for --dtype bf16 --kv-dtype bf16"):
        load_calibration(tmp_path)


def test_saving_replaces_as_a_whole(tmp_path: Path) -> None:
    CALIBRATION.save(tmp_path)
    replace(CALIBRATION, num_threads=4).save(tmp_path)
    assert load_calibration(tmp_path).num_threads == 4
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_shares_of_a_machine_become_overlap() -> None:
    """NanoFlow's shares give NanoFlow's delays; two that do not exceed one machine are worth nothing."""
    shared = replace(CALIBRATION, gemm_share=0.6, attention_share=0.8).separate_cores()
    assert (shared.compute_delay, shared.memory_delay) == pytest.approx((0.5, 1 / 3))
    assert replace(CALIBRATION, gemm_share=0.5, attention_share=0.3).separate_cores() == SEQUENTIAL
    assert CALIBRATION.separate_cores() == SEQUENTIAL
    assert replace(CALIBRATION, gemm_share=1.1, attention_share=1.1).separate_cores() == PERFECT


def test_peaks_are_the_highest_rates_measured() -> None:
    peaks = replace(
        CALIBRATION, gemm_points=((1, 1e9), (64, 9e15)), bandwidth_points=((1, 8e15),), kv_bytes_per_s=1e9
    ).peaks()
    assert (peaks.flop_per_s, peaks.bytes_per_s, peaks.is_measured) == (9e15, 8e15, True)
    none = replace(CALIBRATION, gemm_points=(), bandwidth_points=())
    assert none.peaks().flop_per_s == none.gemm_flop_per_s
    assert none.peaks().bytes_per_s == max(none.kv_bytes_per_s, none.weight_bytes_per_s)


def test_planning_counts_prefill_attention_as_steps_do() -> None:
    cost = CALIBRATION.step_cost(MODEL)
    num_tokens = 4096
    step_s = cost.compute_s(num_tokens, num_tokens * num_tokens / 2) - cost.constant_s
    assert cost.cost_model().compute_s(num_tokens, 0) == pytest.approx(step_s)


def test_no_calibration_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `blendserve calibrate --dtype bf16`"):
        load_calibration(tmp_path)
    with pytest.raises(ConfigError, match="run `blendserve calibrate --dtype int8 --kv-dtype int8`"):
        load_calibration(tmp_path, "int8", "int8")


def test_calibrated_rates_become_step_times() -> None:
    cost = CALIBRATION.step_cost(MODEL)
    assert cost.token_s == pytest.approx(2 * MODEL.num_matmul_parameters / 2e11)
    assert cost.constant_s == pytest.approx(1e-5 + 3e-6 * MODEL.num_layers)
    assert cost.memory_s(1000) == pytest.approx(1000 * 131072 / 3e10)
    assert cost.interference == Interference(0.6, 0.5)
    assert CALIBRATION.hardware().flop_per_s == 2e11
    assert replace(CALIBRATION, layer_constant_s=0.0, loop_s=0.0).step_cost(MODEL).constant_s == 0.0


def test_a_calibrated_step_multiplies_what_it_samples_by_the_vocabulary() -> None:
    """The head of a small model is a quarter of its decode, and loading it a quarter of its smallest step."""
    small = ModelCost.from_spec(SMOLLM2_135M)
    cost = CALIBRATION.step_cost(small)
    head = 49152 * 576
    assert cost.head_s == pytest.approx(2 * head / 2e11)
    assert cost.compute_s(64, num_sampled=64) - cost.compute_s(64) == pytest.approx(
        max(2 * head / CALIBRATION.weight_bytes_per_s, 64 * 2 * head / 2e11)
    )
    num_weights = small.num_matmul_parameters + head
    assert cost.compute_s(1, num_sampled=1) >= 2 * num_weights / CALIBRATION.weight_bytes_per_s * (1 - 1e-9)
    assert cost.cost_model().decode_s == pytest.approx(2 * num_weights / 2e11)


def test_only_the_native_engine_reads_shared_prefixes_once() -> None:
    assert gpu_step_cost(MODEL, A100_80G).shared_kv_share == 1
    assert 0 < CALIBRATION.step_cost(MODEL).shared_kv_share < 1


def test_overlapped_steps_read_the_weights_twice_where_that_pays() -> None:
    """auto takes the shorter of both ways, on the overlapped one in every step, off never."""
    linear = replace(CALIBRATION, step_points=())
    by_mode = {mode: linear.step_cost(MODEL, mode) for mode in ("off", "auto", "on")}
    floor_s = by_mode["on"].weight_floor_s
    many = 10 * floor_s / by_mode["on"].token_s
    for num_tokens, compute_s, memory_s in (
        (many, 10 * floor_s, 10 * floor_s),
        (2, floor_s, floor_s),
        (many, 1.0, 0.0),
    ):
        apart_s = compute_s + memory_s
        again_s = 0.0 if num_tokens == many else floor_s
        overlapped_s = max(compute_s + 0.6 * memory_s, memory_s + 0.5 * compute_s) + again_s
        found = {mode: cost.step_s(num_tokens, compute_s, memory_s) for mode, cost in by_mode.items()}
        assert found["off"] == pytest.approx(apart_s)
        assert found["on"] == pytest.approx(overlapped_s)
        assert found["auto"] == pytest.approx(min(apart_s, overlapped_s))
    assert by_mode["on"].step_s(1, 1.0, 1.0) == 2.0, "one token cannot be split"


def test_steps_of_few_tokens_take_as_long_as_they_were_measured() -> None:
    """Matrix products of 8 tokens at a tenth of the full rate; between points time is linear."""
    found = replace(CALIBRATION, step_points=((1, 2.5e10), (8, 2e10), (64, 2e11), (256, 2e11)), weight_bytes_per_s=1e12)
    cost = found.step_cost(MODEL)

    def step_s(num_tokens: int) -> float:
        return cost.compute_s(num_tokens) - cost.constant_s

    flop = 2 * MODEL.num_matmul_parameters
    assert step_s(1) == pytest.approx(flop / 2.5e10)
    assert step_s(8) == pytest.approx(8 * flop / 2e10)
    assert step_s(36) == pytest.approx((step_s(8) + step_s(64)) / 2)
    for count in (64, 256, 1000):
        assert step_s(count) == pytest.approx(count * flop / 2e11)
    faster = replace(found, step_points=((64, 4e11), (256, 2e11))).step_cost(MODEL)
    assert faster.compute_s(64) - faster.constant_s == pytest.approx(64 * flop / 2e11), "bounds hold"


def test_a_run_without_overlap_is_planned_without() -> None:
    perfect = replace(CALIBRATION, compute_delay=0.0, memory_delay=0.0)
    assert perfect.step_cost(MODEL).cost_model().has_overlap
    assert not perfect.step_cost(MODEL, "off").cost_model().has_overlap

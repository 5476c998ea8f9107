"""Calibration on a tiny shape: what is measured is whole and positive, stored, and used only where it belongs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_spec

from blendserve.calibration.measure import Spread, calibrate, thread_counts
from blendserve.calibration.step_probe import Effort, Probe, rounds_within
from blendserve.cli import main
from blendserve.cli.calibrate import describe
from blendserve.config import KV_DTYPES, KvDtype
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import SEQUENTIAL, Interference
from blendserve.costs.stored_calibration import Calibration, load_calibration
from blendserve.costs.this_machine import cost_of
from blendserve.host import available_memory_bytes
from blendserve.simulator.target import find_machine

TINY = Effort(2, (1, 16, 64), longest_step_s=60.0, phase_s=0.0, max_rounds=4, kv_bytes=1 << 20)
SPEC = tiny_spec()


class FakeClock:
    """Every look at it takes a second."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.fixture(scope="module")
def measured() -> Calibration:
    return calibrate(2, TINY, shape=SPEC, clock=FakeClock()).calibration


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLENDSERVE_CACHE", str(tmp_path))
    return tmp_path


def test_everything_is_measured() -> None:
    measured = calibrate(2, TINY, shape=SPEC, clock=FakeClock())
    spreads = [measured.weight_bytes_per_s, measured.prefill_attention_flop_per_s, measured.layer_constant_s]
    spreads += [point.flop_per_s for point in measured.gemm]
    spreads += [rate for _, rate in measured.kv_bytes_per_s_by_threads]
    assert measured.side_by_side is not None
    spreads += list(measured.side_by_side)
    assert all(0 < spread.low <= spread.median <= spread.high for spread in spreads)
    assert [point.num_tokens for point in measured.gemm] == [1, 16, 64]
    assert [count for count, _ in measured.kv_bytes_per_s_by_threads] == [1, 2]
    found = measured.calibration
    assert found.kv_bytes_per_s == measured.kv_bytes_per_s_by_threads[-1][1].median
    assert found.gemm_points == tuple((point.num_tokens, point.flop_per_s.median) for point in measured.gemm)
    assert found.gemm_share == measured.side_by_side.gemm_beside.median
    assert found.attention_share == measured.side_by_side.attention_beside.median
    assert 0 < found.memory_bytes <= 2 * available_memory_bytes()


def test_the_largest_step_is_modelled_as_measured() -> None:
    """Three rounds have one median, of times as of rates; the fake clock counts a second for the loop."""
    measured = calibrate(1, TINY, shape=SPEC, clock=FakeClock())
    largest = measured.gemm[-1]
    found = measured.calibration
    assert found.loop_s > 0
    assert found.step_points[-1][1] == found.gemm_flop_per_s
    floor_s = found.step_cost(ModelCost.from_spec(replace(SPEC, num_layers=2))).weight_floor_s
    expected_s = max(floor_s - found.loop_s, largest.step_s)
    assert largest.modelled_s == pytest.approx(expected_s, rel=1e-9)


def test_plans_count_on_the_delays_of_overlapped_steps(measured: Calibration) -> None:
    interference = Interference(measured.compute_delay, measured.memory_delay)
    assert measured.step_cost(ModelCost.from_spec(SPEC)).interference == interference
    assert measured.overlap_cost().interference == interference


def test_one_thread_has_no_half() -> None:
    measured = calibrate(1, TINY, shape=SPEC, clock=FakeClock())
    assert measured.side_by_side is None
    assert measured.calibration.separate_cores() == SEQUENTIAL
    assert "not measured" in describe(measured)


def test_steps_that_take_too_long_are_left_out() -> None:
    measured = calibrate(1, replace(TINY, longest_step_s=0.0), shape=SPEC, clock=FakeClock())
    assert [point.num_tokens for point in measured.gemm] == [1]


@pytest.mark.parametrize(("budget_s", "expected"), [(0.0, 3), (2.5, 5), (100.0, 6)])
def test_rounds_fill_the_time_between_three_and_the_most(budget_s: float, expected: int) -> None:
    effort = replace(TINY, max_rounds=6)
    assert len(rounds_within(lambda: None, effort, FakeClock(), budget_s)) == expected


def test_thread_counts_double_and_end_with_all() -> None:
    assert [thread_counts(count) for count in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_spread_is_the_median_between_the_extremes() -> None:
    assert Spread.of([5.0, 1.0, 2.0]) == (1.0, 2.0, 5.0)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_probe_reads_the_whole_kv_memory(kv_dtype: KvDtype) -> None:
    probe = Probe(SPEC, num_threads=1, num_sequences=3, max_tokens=32, context=50, kv_dtype=kv_dtype)
    probe.touch()
    work = probe.decode()
    assert work.kv_bytes == 3 * 64 * SPEC.kv_bytes_per_token(kv_dtype)
    assert work.matmul_flop == 2 * 3 * SPEC.num_layers * SPEC.num_layer_parameters
    assert probe.prefill(32).matmul_flop == 2 * 32 * SPEC.num_layers * SPEC.num_layer_parameters
    assert 0 < work.matmul_s + work.attention_s < work.elapsed_s
    probe.close()


def test_a_plan_uses_the_calibration_of_this_machine(cache: Path, measured: Calibration) -> None:
    measured.save(cache)
    notes: list[str] = []
    assert cost_of(SPEC, 2, notes.append) == measured.step_cost(ModelCost.from_spec(SPEC)).cost_model()
    assert not notes


def test_a_calibration_of_other_threads_or_machines_is_noted_and_not_used(
    cache: Path, measured: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    notes: list[str] = []
    built_in = [cost_of(SPEC, count, notes.append) for count in (2, 3)]
    assert not notes, "without a calibration there is nothing to say"
    measured.save(cache)
    assert cost_of(SPEC, 3, notes.append) == built_in[1]
    assert "2 threads" in notes.pop()
    replace(measured, machine="another box").save(cache)
    assert cost_of(SPEC, 2, notes.append) == built_in[0]
    assert "another box" in notes.pop()
    assert capsys.readouterr() == ("", ""), "a library prints nothing"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"version": 1}', b'{"version": 9}'])
def test_a_damaged_calibration_is_noted_and_not_used(content: bytes, cache: Path) -> None:
    notes: list[str] = []
    built_in = cost_of(SPEC, 2, notes.append)
    (cache / "calibration.json").write_bytes(content)
    assert cost_of(SPEC, 2, notes.append) == built_in
    assert "blendserve calibrate" in notes.pop()


def test_the_command_stores_and_prints(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blendserve.calibration.measure.QUICK", replace(TINY, num_layers=1, token_counts=(1, 8)))
    assert main(["calibrate", "--quick", "--threads", "2"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "GFLOP/s",
        "threads",
        "prefill attention",
        "beside the other",
        "side by side in each core",
        "--overlap auto",
    ):
        assert text in printed
    stored = load_calibration(cache)
    assert stored.num_threads == 2
    assert main(["calibrate", "--quick", "--threads", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["side_by_side"] is None
    assert Calibration.from_json(json.dumps(printed["calibration"])) == load_calibration(cache)
    assert load_calibration(cache).num_threads == 1
    assert [path.name for path in cache.iterdir()] == ["calibration.json"]


def test_calibrate_measures_the_kv_dtype_asked_for(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blendserve.calibration.measure.QUICK", replace(TINY, num_layers=1, token_counts=(1, 8)))
    assert main(["calibrate", "--quick", "--threads", "1", "--kv-dtype", "int8"]) == 0
    assert "KV in int8" in capsys.readouterr().out
    assert [path.name for path in cache.iterdir()] == ["calibration-kv-int8.json"]
    stored = load_calibration(cache, kv_dtype="int8")
    model = ModelCost.from_spec(SPEC, kv_dtype="int8")
    notes: list[str] = []
    assert cost_of(SPEC, 1, notes.append, kv_dtype="int8") == stored.step_cost(model).cost_model()
    assert cost_of(SPEC, 1, notes.append) != cost_of(SPEC, 1, notes.append, kv_dtype="int8")
    machine = find_machine(None, SPEC, kv_dtype="int8")
    assert machine.cost.kv_token_s == model.kv_bytes_per_token / stored.kv_bytes_per_s
    assert machine.hardware.name == stored.machine
    assert find_machine(None, SPEC).hardware.name != stored.machine  # no calibration for KV in bf16

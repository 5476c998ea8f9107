"""The first long run on a machine measures it once, says so, and never spoils what is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from batch_fakes import batch_line, write_lines
from calibration_cases import CALIBRATION
from test_measure import SPEC, TINY, FakeClock
from tiny_files import tiny_directory

from blendserve import LLM, NativeSettings, SamplingParams, run_batch
from blendserve.calibration.first_run import LEAST_WORK_S, calibrate_first_run, expected_work_s
from blendserve.calibration.measure import FIRST_RUN, calibrate
from blendserve.config import EngineConfig
from blendserve.costs.model_cost import CostModel
from blendserve.costs.step_cost import SEQUENTIAL, Interference
from blendserve.costs.stored_calibration import Calibration, load_calibration, machine_name
from blendserve.engines.opening import open_engine
from blendserve.planner.base import RequestTable
from blendserve.report.summary import RunSummary

CONFIG = EngineConfig(num_threads=2)
HERE = replace(CALIBRATION, machine=machine_name(), effort="first-run")


class FakeMeasure:
    """Counts how often the machine is measured."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, config: EngineConfig) -> Calibration:
        self.num_calls += 1
        return replace(HERE, dtype=config.dtype, num_threads=config.num_threads)


@pytest.fixture
def measure() -> FakeMeasure:
    return FakeMeasure()


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def first_run(measure: FakeMeasure, notes: list[str], tmp_path: Path) -> Callable[..., Calibration | None]:
    def call(config: EngineConfig = CONFIG, work_s: float = LEAST_WORK_S) -> Calibration | None:
        return calibrate_first_run(config, lambda: work_s, tmp_path, notes.append, measure=measure)

    return call


def test_a_machine_is_measured_once_per_dtype(
    first_run: Callable[..., Calibration | None], measure: FakeMeasure, notes: list[str], tmp_path: Path
) -> None:
    assert first_run() == HERE == load_calibration(tmp_path)
    assert "about 3 s" in notes[0]
    assert str(tmp_path / "calibration.json") in notes[1]
    assert first_run() is None
    assert measure.num_calls == 1
    assert len(notes) == 2
    assert first_run(replace(CONFIG, dtype="int8")) is not None
    assert load_calibration(tmp_path, "int8").effort == "first-run"


def test_short_work_measures_nothing(first_run: Callable[..., Calibration | None], tmp_path: Path) -> None:
    assert first_run(work_s=0.99 * LEAST_WORK_S) is None
    assert list(tmp_path.iterdir()) == []


def test_engines_that_share_a_machine_do_not_measure_each_other(first_run: Callable[..., Calibration | None]) -> None:
    assert first_run(replace(CONFIG, memory_share=0.5)) is None


def test_a_cache_that_cannot_be_written_is_no_error(measure: FakeMeasure, notes: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert calibrate_first_run(CONFIG, lambda: 1e9, tmp_path / "file", notes.append, measure=measure) == HERE
    assert "this run only" in notes[-1]
    assert "BLENDSERVE_CACHE" in notes[-1]


def test_a_thorough_calibration_is_kept(
    first_run: Callable[..., Calibration | None], measure: FakeMeasure, notes: list[str], tmp_path: Path
) -> None:
    thorough = replace(HERE, effort="thorough")
    thorough.save(tmp_path)
    assert first_run() is None
    assert measure.num_calls == 0
    assert first_run(replace(CONFIG, num_threads=1)) == replace(HERE, num_threads=1), "measured for this run"
    assert load_calibration(tmp_path) == thorough
    assert "this run only" in notes[-1]


def test_a_first_run_with_other_threads_and_a_damaged_file_are_replaced(
    first_run: Callable[..., Calibration | None], tmp_path: Path
) -> None:
    first_run()
    first_run(replace(CONFIG, num_threads=1))
    assert load_calibration(tmp_path).num_threads == 1
    (tmp_path / "calibration.json").write_text("{")
    first_run()
    assert load_calibration(tmp_path).num_threads == 2


def test_a_machine_that_cannot_be_measured_runs_all_the_same(notes: list[str], tmp_path: Path) -> None:
    def fail(_: EngineConfig) -> Calibration:
        return replace(HERE, gemm_flop_per_s=0.0)

    assert calibrate_first_run(CONFIG, lambda: 1e9, tmp_path, notes.append, measure=fail) is None
    assert "built-in rates are used" in notes[-1]


def test_expected_work_counts_shared_tokens_once_and_known_lengths() -> None:
    table = RequestTable(np.array([100, 100]), np.array([10, 1_000_000]), np.array([10, -1]))
    cost = CostModel(token_s=1.0, kv_token_s=1.0, has_overlap=False)
    unknown = 256
    compute_s = 200 + 10 + unknown - 90
    memory_s = 10 * 105 + unknown * (100 + unknown / 2)
    assert expected_work_s(cost, table, 90) == pytest.approx(compute_s + memory_s)


def test_the_first_run_measures_what_plans_need_and_no_more() -> None:
    effort = replace(
        FIRST_RUN, num_layers=2, num_overlap_layers=1, token_counts=(1, 16), kv_bytes=1 << 20, total_s=1e9, phase_s=0.0
    )
    measured = calibrate(2, effort, shape=SPEC, clock=FakeClock())
    assert measured.calibration.effort == "first-run"
    assert measured.side_by_side is None
    assert [count for count, _ in measured.kv_bytes_per_s_by_threads] == [2]
    assert len({trial.cost for trial in measured.overlap}) == 2
    assert Calibration.from_json(measured.calibration.to_json()) == measured.calibration


@pytest.mark.parametrize(("total_s", "num_settings"), [(1.0, 0), (12.0, 1), (20.0, 2), (60.0, 3)])
def test_settings_of_overlap_are_tried_while_there_is_time(total_s: float, num_settings: int) -> None:
    """Every look at the clock takes a second. Without a trial nothing is overlapped."""
    measured = calibrate(1, replace(TINY, total_s=total_s), shape=SPEC, clock=FakeClock())
    assert len({trial.cost for trial in measured.overlap}) == num_settings
    found = measured.calibration
    assert num_settings or Interference(found.compute_delay, found.memory_delay) == SEQUENTIAL


@pytest.fixture
def always(measure: FakeMeasure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMeasure:
    """Every run of the native engine is long."""

    def call(config: EngineConfig, _: Callable[[], float], *rest: object) -> Calibration | None:
        return calibrate_first_run(config, lambda: 1e9, *rest, measure=measure)  # type: ignore[arg-type]

    monkeypatch.setenv("BLENDSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("blendserve.engines.native.loop.calibrate_first_run", call)
    return measure


@pytest.mark.parametrize("window", [None, 2])
def test_a_run_measures_and_says_so(always: FakeMeasure, tmp_path: Path, window: int | None) -> None:
    model = str(tiny_directory(tmp_path / "tiny"))
    settings = NativeSettings(model, kv_memory_bytes=4 << 20, num_threads=2, window=window)
    source = write_lines(tmp_path / "in.jsonl", [batch_line(f"r{number}") for number in range(5)])
    for name, measures in (("first", True), ("second", False)):
        engine = open_engine(settings)
        report = run_batch(source, tmp_path / f"{name}.jsonl", engine=engine)
        summary = RunSummary([report], "blend", 1.0, engine.times, engine.stats)
        assert report.num_succeeded == 5
        assert (engine.times.calibrate_s > 0) == measures == ("calibrate" in summary.to_text())
        assert summary.to_json()["calibration"] == "first-run"
        engine.close()
    assert always.num_calls == 1


def test_a_short_run_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLENDSERVE_CACHE", str(tmp_path / "cache"))
    model = str(tiny_directory(tmp_path / "tiny"))
    source = write_lines(tmp_path / "in.jsonl", [batch_line("r")])
    engine = open_engine(NativeSettings(model, kv_memory_bytes=4 << 20, num_threads=1))
    run_batch(source, tmp_path / "out.jsonl", engine=engine)
    assert engine.stats is not None
    assert engine.stats.calibration is None
    assert not (tmp_path / "cache" / "calibration.json").exists()
    engine.close()


def test_an_llm_measures_once_for_lists_and_streams(always: FakeMeasure, tmp_path: Path) -> None:
    model = str(tiny_directory(tmp_path / "tiny"))
    params = SamplingParams(max_tokens=2)
    for stream in (False, True):
        with LLM(model, kv_memory_bytes=4 << 20, num_threads=1 + stream) as llm:
            first, second = (
                list(llm.stream(["who", "what"], params)) if stream else llm.generate(["who", "what"], params)
                for _ in range(2)
            )
            assert [output.outputs[0].token_ids for output in first] == [o.outputs[0].token_ids for o in second]
            assert any("measuring this machine" in note for note in llm.notes)
    assert always.num_calls == 2

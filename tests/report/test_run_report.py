"""The page and the trace file of a measured run, of steps made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_pages import PageFacts

from blendserve.costs.hardware import Peaks
from blendserve.engine.stats import Resources, RunStats
from blendserve.engines.native.measured import MeasuredRun
from blendserve.errors import ConfigError
from blendserve.executors.native import NativeCounters
from blendserve.executors.trace import StepTrace
from blendserve.report import trace_file
from blendserve.report.run_page import run_page, write_page
from blendserve.report.trace_file import write_trace

OPS = ("norm", "qkv", "attention", "down")
SECONDS_BY_OP = {"norm": 0.1, "qkv": 1.0, "attention": 0.5, "down": 1.5}


def measured(resources_s: Sequence[tuple[float, float]], *, max_spans: int = 10_000, gap_s: float = 0.1) -> MeasuredRun:
    """A run of steps of one second that do so much compute and memory work, `gap_s` apart, two workers."""
    stats = RunStats(capacity_tokens=1000)
    trace = StepTrace(max_spans)
    begin_s = 100.0
    for step, (compute_s, memory_s) in enumerate(resources_s):
        stats.add_step(
            elapsed_s=1.0,
            compute_s=compute_s,
            memory_s=memory_s,
            num_prefill_tokens=10 * (step % 2),
            num_decode_tokens=4,
            num_kv_tokens=100 + step,
            num_running=5,
        )
        start = int(begin_s * 1e9)
        spans = [
            (worker, op, layer, 0, start + 1000 * (10 * layer + op), start + 1000 * (10 * layer + op) + 900, 800)
            for worker in range(2)
            for layer in range(4)
            for op in range(len(OPS))
        ]
        trace.add(begin_s, begin_s + 1.0, np.array(spans) if trace.wants_spans else None)
        begin_s += 1.0 + gap_s
    stats.num_prompt_tokens, stats.num_output_tokens, stats.max_kv_tokens = 700, 300, 250
    stats.resources = Resources(270_000_000, 4_000_000_000, 80_000_000, 900_000_000, 1.25)
    counters = NativeCounters(len(resources_s), 0, 10, 2e12, 1e11, 5e9, 7e9, SECONDS_BY_OP)
    peaks = Peaks(100e9, 20e9, is_measured=True)
    return MeasuredRun(
        "jobs <in>.jsonl", "tiny", "blend", "a machine", 2, "avx2", peaks, stats, counters, trace, OPS, 0.4
    )


def test_shares_and_balance_by_hand() -> None:
    apart = measured([(1.0, 0.0), (0.0, 0.5)])
    assert apart.elapsed_s == pytest.approx(2.1)
    assert apart.compute_share == pytest.approx(1.0 / 2.1)
    assert apart.memory_share == pytest.approx(0.5 / 2.1)
    assert apart.stats.balance == 0.0
    assert measured([(0.6, 0.2), (0.3, 0.1)]).stats.balance == pytest.approx(1.0)
    assert measured([(0.6, 0.2), (0.2, 0.2)]).stats.balance == pytest.approx(0.25 + 0.5)
    assert measured([]).stats.balance == measured([]).compute_share == measured([(0.0, 0.0)]).stats.balance == 0.0


def test_the_page_shows_the_run_and_loads_nothing() -> None:
    facts = PageFacts.of(run_page(measured([(0.8, 0.1)] * 30 + [(0.2, 0.6)] * 30)))
    assert facts.problems == []
    assert facts.title == "Run of jobs <in>.jsonl"
    assert "Measured: policy blend" in facts.text
    assert "simulated" not in facts.text.lower()
    expected = ("45.5%", "31.9%", "900 MB", "1.25 s", "40.0% at best", "In 0 steps ops ran beside", "matrix products")
    for text in (*expected, "as `blendserve calibrate` measured"):
        assert text in facts.text, text
    assert any("50 GFLOP/s" in title or "GFLOP/s" in title for title in facts.titles)
    assert any(title.startswith("qkv, layer 1, nano-batch 0") for title in facts.titles)


def test_a_page_of_no_steps_and_of_guessed_peaks() -> None:
    run = measured([])
    assert PageFacts.of(run_page(run)).problems == []
    assert "The two resources" not in run_page(run)
    assert run_page(measured([(0.5, 0.5)], max_spans=0)).count("Inside one step") == 0


def events_of(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    content = json.loads(path.read_text())
    return content["otherData"], content["traceEvents"]


def test_the_trace_holds_ops_steps_and_counters(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", measured([(0.8, 0.1), (0.2, 0.6)]))
    facts, events = events_of(tmp_path / "trace.json")
    assert facts["ops"] == "of every step"
    assert facts["shares"] == "of 100 GFLOP/s and 20.0 GB/s, as calibrated"
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert sorted(names.values()) == ["steps", "worker 0", "worker 1"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in spans if names[event["tid"]] == "steps"] == ["step 0", "step 1"]
    ops = [event for event in spans if names[event["tid"]] == "worker 1"]
    assert len(ops) == 2 * 4 * len(OPS)
    assert (ops[0]["name"], ops[0]["ts"], ops[0]["dur"]) == ("norm", 0.0, 0.9)
    assert ops[1]["args"] == {"layer": 0, "nano_batch": 0, "busy_us": 0.8}
    assert {event["cat"] for event in ops if event["name"] == "attention"} == {"memory"}
    second = next(event for event in spans if event["name"] == "step 1")
    assert second["ts"] == pytest.approx(1.1e6)
    assert second["args"] == {"prefill tokens": 10, "decode tokens": 4, "compute share": 0.2, "memory share": 0.6}
    counters = [event for event in events if event["ph"] == "C"]
    tracks = {event["name"] for event in counters}
    assert tracks == {"compute share", "memory share", "running sequences", "KV use"}
    # The first of two slices is step 0, the gap after it, and the first twentieth of a second of what follows.
    first = {event["name"]: next(iter(event["args"].values())) for event in reversed(counters) if event["ts"] == 0}
    assert first == {"compute share": pytest.approx(77.06), "memory share": pytest.approx(12.12)} | {
        "running sequences": 5.0,
        "KV use": pytest.approx(10.0, abs=0.1),
    }


def test_a_long_run_makes_a_short_trace_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_file, "MAX_POINTS", 50)
    write_trace(tmp_path / "trace.json", measured([(0.5, 0.5)] * 1000, max_spans=200))
    facts, events = events_of(tmp_path / "trace.json")
    assert facts["ops"] == "of every 256. step"
    assert facts["counters"] == "means over 50 slices of the run"
    assert len([event for event in events if event["ph"] == "C"]) == 4 * 51
    assert len([event for event in events if event["name"].startswith("step ")]) <= 60
    assert len([event for event in events if event["ph"] == "X"]) <= 60 + 200


def test_the_name_of_a_file_may_be_no_text(tmp_path: Path) -> None:
    run = replace(measured([(1.0, 1.0)]), source="in \udcff.jsonl")
    write_page(tmp_path / "page.html", run)
    write_trace(tmp_path / "trace.json", run)
    assert "Run of in ?.jsonl" in (tmp_path / "page.html").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"]["source"] == run.source


def test_files_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    run = measured([(0.5, 0.5)])
    with pytest.raises(ConfigError, match="cannot write the trace"):
        write_trace(tmp_path, run)
    with pytest.raises(ConfigError, match="cannot write the report"):
        write_page(tmp_path, run)

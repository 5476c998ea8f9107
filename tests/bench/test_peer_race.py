"""The peers' race without peers: the protocol with a worker, its faults, the arithmetic of the tables."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import common
import peer_lineup
import peers
import pytest
from peaks import Peak
from peer_lineup import Entrant, entrant, parse_override
from peer_process import PeerError, PeerProcess
from run_store import RunStore

from blendserve.models.spec import ModelSpec

SPEC = ModelSpec(
    name="tiny",
    architecture="llama",
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    max_position=64,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
)

SPEC_OF_MANY = replace(SPEC, vocab_size=1000)


def start(fault: str = "", timeout_s: float = 30.0) -> PeerProcess:
    worker = Path(__file__).with_name("fake_peer_worker.py")
    return PeerProcess(Entrant("fake", (sys.executable, str(worker)), {}, {"fault": fault}), [1, 2, 3], 5, timeout_s)


def test_worker_answers_jobs_although_the_engine_prints() -> None:
    with start() as process:
        assert process.description["answer"] == "3 tokens in, at most 5 out"
        assert process.description["precision"] == "exact"
        assert [process.run([[1], [2, 3]], [4, 5]).num_output_tokens for _ in range(2)] == [9, 9]


def test_worker_that_cannot_load_says_why() -> None:
    with pytest.raises(PeerError, match="no such instruction set"):
        start("load")


@pytest.mark.parametrize(
    ("fault", "message"), [("crash", "illegal instruction"), ("short", "made .3, 3.* tokens, not")]
)
def test_worker_that_fails_in_a_job_is_an_error(fault: str, message: str) -> None:
    with start(fault) as process, pytest.raises(PeerError, match=message):
        process.run([[1], [2]], [4, 4])


def test_silent_worker_is_an_error() -> None:
    with pytest.raises(PeerError, match="no answer"):
        start(timeout_s=0.0)


def test_flop_and_bytes_against_counting_token_by_token() -> None:
    workload = peers.Workload("w", num_requests=3, prompt_tokens=5, output_tokens=4)
    flop = memory = 0.0
    for _ in range(workload.num_requests):
        for position in range(5 + 4 - 1):
            flop += 2 * SPEC.num_layers * SPEC.num_layer_parameters
            flop += 2 * 2 * SPEC.num_layers * SPEC.num_heads * SPEC.head_dim * (position + 1)  # scores, then values
            if position >= 4:  # the last prompt token and every token fed back yield logits
                flop += 2 * SPEC.vocab_size * SPEC.hidden_size
            if position >= 5:  # decode: reads the KV of all tokens up to its own
                memory += (position + 1) * SPEC.kv_bytes_per_token()
    memory += 4 * 2 * (SPEC.num_layers * SPEC.num_layer_parameters + SPEC.vocab_size * SPEC.hidden_size)
    assert workload.flop(SPEC) == pytest.approx(flop)
    assert workload.decode_bytes(SPEC) == pytest.approx(memory)


def test_prompts_repeat_with_the_seed_and_share_nothing() -> None:
    workload = peers.Workload("w", 4, 8, 2)
    prompts = workload.prompts(1000, "a")
    assert prompts == workload.prompts(1000, "a") != workload.prompts(1000, "b")
    assert all(peers.FIRST_ORDINARY_TOKEN <= token < 1000 for prompt in prompts for token in prompt)
    assert len({tuple(prompt[:2]) for prompt in prompts}) == 4


def test_speedup_is_the_median_of_pairs() -> None:
    def results(peer: str, seconds: list[float]) -> list[peers.Result]:
        return [peers.Result(peer, "w", i, s, s, 100, 10, 0.0) for i, s in enumerate(seconds)]

    ours = results("ours", [1.0, 10.0, 1.0])  # the machine was slow for both in the second repeat
    table = peers._table(
        peers.Workload("w", 3, 5, 4), ours + results("peer", [2.0, 20.0, 3.0]), SPEC, Peak(1e9, 2e9, "a test")
    )
    assert "2.00 (2.00..3.00)x" in table


def test_overrides_reach_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino" / "bin").mkdir(parents=True)
    (tmp_path / "openvino" / "bin" / "python").touch()
    monkeypatch.setattr(peer_lineup, "PEERS_DIR", tmp_path)
    _, path, value = parse_override("openvino.scheduler.max_num_seqs=64")
    chosen = entrant("openvino", tmp_path / "m.gguf", 2, {path: value})
    assert chosen.settings["scheduler"]["max_num_seqs"] == 64
    assert parse_override("openvino.properties.KV_CACHE_PRECISION=f32")[2] == "f32"


def test_missing_environment_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_lineup, "PEERS_DIR", tmp_path)
    with pytest.raises(SystemExit, match="scripts/setup-peers llamacpp"):
        entrant("llamacpp", tmp_path / "m.gguf", 2, {})


def test_table_aligns_and_summary_orders() -> None:
    assert common.table(["", "x"], [["name", "1"], ["n", "22"]]).splitlines() == [
        "|      |  x |",
        "|------|---:|",
        "| name |  1 |",
        "| n    | 22 |",
    ]
    assert common.summarise([3.0, 1.0, 2.0]).text(1) == "2.0 (1.0..3.0)"


def test_header_names_machine_and_commit(capsys: pytest.CaptureFixture[str]) -> None:
    common.print_header()
    printed = capsys.readouterr().out
    assert f"{common.machine().num_cores} cores" in printed
    assert "commit:" in printed


def test_a_race_is_run_in_turn_and_goes_on_where_it_was(tmp_path: Path) -> None:
    arguments = argparse.Namespace(set=["b.x=1"], repeats=2, threads=2)
    workload = peers.Workload("w", 2, 3, 4)
    cells = peers.cells_of([workload], ["a", "b"], "model", arguments)
    assert [(cell.peer, cell.repeat) for cell in cells] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert len({str(cell.key) for cell in cells}) == 4
    store = RunStore(tmp_path / "runs.jsonl", code="c", on_machine="m")
    worker = Path(__file__).with_name("fake_peer_worker.py")
    with PeerProcess(Entrant("a", (sys.executable, str(worker)), {}, {"fault": ""}), [1], 5, 30.0) as process:
        peers._race([process], cells, SPEC_OF_MANY, store)
    again = RunStore(tmp_path / "runs.jsonl", code="c", on_machine="m")
    assert [len(again.runs(cell.key)) for cell in cells] == [1, 0, 0, 1]
    assert peers.Result(**again.runs(cells[0].key)[0]).num_output_tokens == 8


@pytest.mark.parametrize(("precision", "share"), [("int8", "25%"), ("q8_0", "50%"), ("", "50%")])
def test_the_peak_is_that_of_the_precision(precision: str, share: str) -> None:
    assert Peak(2e9, 4e9, "a test").share(1e9, precision) == share
    assert not Peak(0.0, 0.0, "unknown").share(1e9, precision)

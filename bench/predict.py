"""What `blendserve plan` predicts of a run against what the run takes, for several settings of the native engine.

    python bench/predict.py                         int8 and bf16, small and default KV memory, off and on: 5 minutes
    python bench/predict.py --repeats 3                          medians of three rounds: 15 minutes
    python bench/predict.py --dtype int8 --scale 0.03                                             a quick look

In every round the machine is measured anew, into a cache of its own, for each precision of weights (`--effort
first-run` as a first long run does it, quick and thorough as `blendserve calibrate` does): machines that are shared get
faster and slower. Then every setting is predicted by the functions behind `plan`, and run by `blendserve run`. Run
nothing else on the machine meanwhile. The last line says which settings were predicted within `--within` (5%), by the
median of the rounds; the exit status is 1 where one was not, and 2 where other processes took so much of the machine
that the times say nothing. Mixes are those of `token_mixes.py`, and those of `mixes.py` (`text-exam`, ...) where
`--questions` is given.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import common
import mixes
import policies

from blendserve.calibration.measure import FIRST_RUN, FULL, QUICK, calibrate
from blendserve.config import DTYPES, Dtype, EngineConfig, parse_bytes
from blendserve.host import cache_dir, usable_cores
from blendserve.job.batch_input import read_batch
from blendserve.models.hub import resolve
from blendserve.simulator.forecast import Forecast, Part, forecast, planned_workload
from blendserve.simulator.machine import this_machine
from blendserve.simulator.planned_file import plan_batch
from blendserve.simulator.target import find_target, find_tokenizer

EFFORT_BY_NAME = {effort.name: effort for effort in (FIRST_RUN, QUICK, FULL)}
DEFAULT_MEMORY = "default"


class Setting(NamedTuple):
    """What a run is given."""

    dtype: Dtype
    kv_memory: str
    overlap: str
    policy: str

    def config(self) -> EngineConfig:
        num_bytes = 0 if self.kv_memory == DEFAULT_MEMORY else parse_bytes(self.kv_memory)
        return EngineConfig(kv_memory_bytes=num_bytes, overlap=self.overlap, dtype=self.dtype)

    def options(self) -> list[str]:
        memory = [] if self.kv_memory == DEFAULT_MEMORY else ["--kv-memory", self.kv_memory]
        return ["--dtype", self.dtype, "--overlap", self.overlap, "--policy", self.policy, *memory]


@dataclass(frozen=True, slots=True)
class Round:
    """One prediction and its run. `others` is the share of the machine that others took."""

    predicted: Forecast
    measured: dict[str, Any]
    others: float

    @property
    def run_s(self) -> float:
        return float(self.measured["run_s"])

    @property
    def ratio(self) -> float:
        return self.predicted.time_s / self.run_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """One setting: seconds and steps, predicted and run."""

    setting: Setting
    rounds: list[Round]

    @property
    def ratio(self) -> float:
        """Median of the rounds."""
        return median(each.ratio for each in self.rounds)

    @property
    def others(self) -> float:
        return max(each.others for each in self.rounds)


def main() -> None:
    arguments = _parse()
    common.print_header()
    model = resolve(None, cache_dir()).path
    settings = [Setting(*values) for values in product(*(getattr(arguments, name) for name in Setting._fields))]
    lines = policies.lines_of(policies.Setting(arguments.mix, "bf16", "", arguments.scale), arguments.questions)
    num_output_tokens = sum(line.output_tokens for line in lines)
    print(f"### {arguments.mix}: {len(lines)} requests, {num_output_tokens} output tokens\n", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["BLENDSERVE_CACHE"] = str(Path(directory) / "cache")
        batch_file = Path(directory) / f"{arguments.mix}.jsonl"
        mixes.write_batch_file(lines, batch_file)
        outcomes = [Outcome(setting, []) for setting in settings]
        for _ in range(arguments.repeats):
            for dtype in dict.fromkeys(setting.dtype for setting in settings):
                measured = calibrate(usable_cores(), EFFORT_BY_NAME[arguments.effort], dtype=dtype)
                print(f"{measured.calibration}\n", flush=True)
                measured.calibration.save(cache_dir())
                for outcome in outcomes:
                    if outcome.setting.dtype == dtype:
                        outcome.rounds.append(_predict_and_run(outcome.setting, batch_file, model))
    print("\n" + table(outcomes) + "\n\n" + verdict(outcomes, arguments.within))
    sys.exit(status(outcomes, arguments.within))


MOST_OTHERS = 0.03
"""Share of the machine beyond which other processes decide the times."""


def misses(outcomes: Sequence[Outcome], within: float) -> list[str]:
    """Settings whose prediction is off by more than that, or whose steps are."""
    return [" ".join(outcome.setting) for outcome in outcomes if abs(outcome.ratio - 1) > within]


def is_disturbed(outcomes: Sequence[Outcome]) -> bool:
    return any(outcome.others > MOST_OTHERS for outcome in outcomes)


def verdict(outcomes: Sequence[Outcome], within: float) -> str:
    missed = misses(outcomes, within)
    told = f"predicted within {within:.0%}: {len(outcomes) - len(missed)} of {len(outcomes)} settings"
    told += f"; not {', '.join(missed)}" if missed else ""
    if is_disturbed(outcomes):
        most = max(outcome.others for outcome in outcomes)
        told += f". Other processes took {most:.0%} of the machine: these times say nothing; run it again alone"
    return told


def status(outcomes: Sequence[Outcome], within: float) -> int:
    if not misses(outcomes, within):
        return 0
    return 2 if is_disturbed(outcomes) else 1


def _parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, help="MMLU questions, one JSON object a line, for text mixes")
    parser.add_argument("--mix", default="pool")
    parser.add_argument("--scale", type=float, default=0.15, help="fraction of the requests (0.15: 15 s on 2 cores)")
    parser.add_argument("--within", type=float, default=0.05, help="share that a prediction may be off (0.05)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds, each with a calibration of its own (1)")
    parser.add_argument("--dtype", type=names, default=list(DTYPES))
    parser.add_argument("--kv-memory", type=names, default=["96MiB", DEFAULT_MEMORY])
    parser.add_argument("--overlap", type=names, default=["off", "on"])
    parser.add_argument("--policy", type=names, default=["blend"])
    parser.add_argument("--effort", choices=EFFORT_BY_NAME, default="thorough")
    return parser.parse_args()


def _predict_and_run(setting: Setting, batch_file: Path, model: Path) -> Round:
    predicted = predict(setting, batch_file, model)
    watch = common.Watch()
    measured = mixes.run_batch_file(batch_file, ["--model", str(model), *setting.options()])
    done = Round(predicted, measured, watch.others())
    print(f"{' '.join(setting)}: predicted {predicted.time_s:.1f} s, run {done.run_s:.1f} s", flush=True)
    return done


def predict(setting: Setting, batch_file: Path, model: Path) -> Forecast:
    """What `plan` says of the setting, all requests simulated."""
    target = find_target(str(model), notify=print)
    tokenizer, _ = find_tokenizer(None, target, notify=print)
    machine = this_machine(target.spec, config=setting.config())
    with read_batch(batch_file, target.spec, tokenizer) as batch:
        workload = planned_workload(batch_file.name, plan_batch(batch, machine, None))
    found = forecast(workload, {"overlapped": machine}, [setting.policy], lambda whole, _: Part(whole, 1.0))
    return found.runs[0]


def table(outcomes: list[Outcome]) -> str:
    """A row per setting: medians of the rounds; steps of the last one."""
    rows = []
    for outcome in outcomes:
        last = outcome.rounds[-1]
        (simulated,) = last.predicted.result.replicas
        ratios = [each.ratio for each in outcome.rounds]
        rows.append(
            [
                " ".join(outcome.setting),
                f"{median(each.predicted.time_s for each in outcome.rounds):.1f}",
                f"{median(each.run_s for each in outcome.rounds):.1f}",
                f"{outcome.ratio:.3f} ({min(ratios):.3f}-{max(ratios):.3f})",
                f"{simulated.num_steps}",
                f"{last.measured['num_steps']}",
                f"{simulated.num_preemptions}",
                f"{last.measured['num_preemptions']}",
                f"{last.measured['scheduling_share']:.1%}",
                f"{outcome.others:.0%}",
            ]
        )
    header = ["dtype, KV, overlap, policy", "predicted s", "run s", "ratio", "steps predicted", "run", "preempted"]
    return common.table([*header, "run", "scheduling", "others"], rows)


if __name__ == "__main__":
    main()

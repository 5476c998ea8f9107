"""What `blendserve plan` predicts of a run against what the run takes, for several settings of the native engine.

    python bench/predict.py --questions PATH/mmlu_questions.jsonl --scale 0.1

The machine is measured first, into a cache of its own, once for each precision of weights (`--effort first-run` as a
first long run does it, quick and thorough as `blendserve calibrate` does). Then every setting is predicted by the
functions behind `plan`, and run by `blendserve run`. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import common
import mixes

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
class Outcome:
    """One setting: seconds and steps, predicted and run. `neighbours` is the share of the machine that others took."""

    setting: Setting
    predicted: Forecast
    measured: dict[str, Any]
    neighbours: float

    @property
    def ratio(self) -> float:
        return self.predicted.time_s / float(self.measured["run_s"])


def main() -> None:
    arguments = _parse()
    common.print_header()
    model = resolve(None, cache_dir()).path
    settings = [Setting(*values) for values in product(*(getattr(arguments, name) for name in Setting._fields))]
    (mix,) = [mix.scaled(arguments.scale) for mix in mixes.MIXES if mix.name == arguments.mix]
    lines = mixes.build(mix, arguments.questions)
    print(f"### {mixes.title(mix, lines, mixes.encode(lines))}\n", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["BLENDSERVE_CACHE"] = str(Path(directory) / "cache")
        batch_file = Path(directory) / f"{mix.name}.jsonl"
        mixes.write_batch_file(lines, batch_file)
        for dtype in dict.fromkeys(setting.dtype for setting in settings):
            measured = calibrate(usable_cores(), EFFORT_BY_NAME[arguments.effort], dtype=dtype)
            print(f"{measured.calibration}\n", flush=True)
            measured.calibration.save(cache_dir())
        outcomes = [_predict_and_run(setting, batch_file, model) for setting in settings]
    print("\n" + table(outcomes))


def _parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="MMLU questions, one JSON object a line")
    parser.add_argument("--mix", choices=[mix.name for mix in mixes.MIXES], default="all")
    parser.add_argument(
        "--scale", type=float, default=0.1, help="fraction of the requests (0.1: about 20 s on 2 cores)"
    )
    parser.add_argument("--dtype", type=names, default=list(DTYPES))
    parser.add_argument("--kv-memory", type=names, default=["256MiB", DEFAULT_MEMORY])
    parser.add_argument("--overlap", type=names, default=["off", "on"])
    parser.add_argument("--policy", type=names, default=["blend"])
    parser.add_argument("--effort", choices=EFFORT_BY_NAME, default="thorough")
    return parser.parse_args()


def _predict_and_run(setting: Setting, batch_file: Path, model: Path) -> Outcome:
    predicted = predict(setting, batch_file, model)
    before = common.cpu_use()
    measured = mixes.run_batch_file(batch_file, ["--model", str(model), *setting.options()])
    used = common.cpu_use() - before
    outcome = Outcome(setting, predicted, measured, used.stolen_s / max(used.busy_s + used.stolen_s, 1e-9))
    print(f"{' '.join(setting)}: predicted {predicted.time_s:.1f} s, run {measured['run_s']:.1f} s", flush=True)
    return outcome


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
    """A row per setting."""
    rows = []
    for outcome in outcomes:
        (simulated,) = outcome.predicted.result.replicas
        measured = outcome.measured
        rows.append(
            [
                " ".join(outcome.setting),
                f"{outcome.predicted.time_s:.1f}",
                f"{measured['run_s']:.1f}",
                f"{outcome.ratio:.3f}",
                f"{simulated.num_steps}",
                f"{measured['num_steps']}",
                f"{simulated.num_preemptions}",
                f"{measured['num_preemptions']}",
                f"{measured['scheduling_share']:.1%}",
                f"{outcome.neighbours:.0%}",
            ]
        )
    header = ["dtype, KV, overlap, policy", "predicted s", "run s", "ratio", "steps predicted", "run", "preempted"]
    return common.table([*header, "run", "scheduling", "stolen"], rows)


if __name__ == "__main__":
    main()

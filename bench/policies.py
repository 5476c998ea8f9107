"""Policies side by side on the native engine: `blendserve run` on whole blended files, the entrants in turn.

    python bench/policies.py --mixes essays,reports,library --dtype int8,bf16 --kv-memory 512MiB
    python bench/policies.py --mixes library --scale 0.1 --kv-memory 256MiB      a quick look
    python bench/policies.py ... --show                                          the tables of what is done

An entrant is a policy with operators overlapping or not, as in `blend/on` or `fcfs/off`; `blend/auto`, the default of
`blendserve run`, overlaps the steps that gain. Every run is stored when it ends. A bench that was stopped goes on where
it was when it is started again, in another session too; after a change of the engine it begins anew. Mixes are those of
`token_mixes.py`, and those of `mixes.py` (`text-exam`, ...) where `--questions` is given.

A run is parsing, planning, running and writing; loading the model is left out. Balance is 1 where every step mixes
compute and memory as the whole run does. "Others" is the share of the machine that other processes took.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import common
import mixes
import token_mixes
from run_store import RESULTS, Progress, RunStore

from blendserve.config import BYTES_PER_WEIGHT, Dtype
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.stored_calibration import matching_calibration
from blendserve.host import cache_dir, usable_cores
from blendserve.models.gguf_file import GgufFile
from blendserve.models.gguf_spec import spec_from_gguf
from blendserve.models.known import SMOLLM2_135M
from blendserve.planner.tree import PrefixTree

POLICIES = ("fcfs", "dfs", "paper", "blend")
ENTRANTS = (*(f"{policy}/{overlap}" for overlap in ("off", "on") for policy in POLICIES), "blend/auto")
BASE = "dfs/off"
TEXT = "text-"


class Setting(NamedTuple):
    """What the entrants of a table have in common. `scale`: fraction of the requests; `model`: a file, or the default
    model where it is empty."""

    mix: str
    dtype: Dtype
    kv_memory: str
    scale: float
    model: str = ""

    def __str__(self) -> str:
        return " ".join([self.mix, self.dtype, self.kv_memory, *([Path(self.model).name] if self.model else [])])


class Cell(NamedTuple):
    """What one run measures."""

    setting: Setting
    entrant: str

    def key(self) -> dict[str, Any]:
        return {"bench": "policies", **self.setting._asdict(), "entrant": self.entrant}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One whole run. `sharing` is the share of prompt tokens that needed no computation and `most_sharing` the most
    possible; `num_recomputed_tokens` are those of preempted requests. `token_s` is what a prompt token costs by the
    calibration, which is `calibration`; `others` the share of the machine that other processes took meanwhile.
    `balance` is that of `RunStats`."""

    elapsed_s: float
    sharing: float
    most_sharing: float
    num_shared_tokens: int
    num_recomputed_tokens: int
    scheduling_share: float
    balance: float
    num_preemptions: int
    num_steps: int
    token_s: float
    calibration: str
    others: float


def main() -> None:
    arguments = _parse()
    common.print_header()
    store = RunStore(arguments.store)
    entrants = arguments.entrants.split(",")
    settings = [
        Setting(mix, dtype, kv_memory, arguments.scale, arguments.model)
        for mix in arguments.mixes.split(",")
        for dtype in arguments.dtype.split(",")
        for kv_memory in arguments.kv_memory.split(",")
    ]
    if arguments.scale != 1.0:
        print(
            f"SMALL RUN: {arguments.scale:g} of the requests. Its beginning and end weigh more than those of a file.\n"
        )
    if not arguments.show:
        for dtype in dict.fromkeys(setting.dtype for setting in settings):
            _calibrate(dtype)
        run_missing(settings, entrants, store, arguments)
    for setting in settings:
        print(f"\n### {setting}, {setting.scale:g} of the requests\n")
        outcomes = stored(setting, entrants, store)
        print(table(outcomes) + "\n\n" + gains(outcomes) if outcomes else "nothing is done yet", flush=True)
    print(f"\nmeasured at {', '.join(sorted(store.commits)) or 'no commit'}; kept in {arguments.store}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, help="MMLU questions, one JSON object a line, for text mixes")
    parser.add_argument("--entrants", default=",".join(ENTRANTS), help=f"default: {','.join(ENTRANTS)}")
    parser.add_argument("--mixes", default=",".join(token_mixes.BALANCED))
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the requests, for a quick look")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each entrant (1)")
    parser.add_argument("--dtype", default="int8,bf16", help="of weights, comma-separated")
    parser.add_argument("--kv-memory", default="512MiB", help="comma-separated (512MiB)")
    parser.add_argument("--model", default="", help="GGUF file; the default model if absent")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run that would end later than this")
    parser.add_argument("--show", action="store_true", help="run nothing, print the tables of what is done")
    parser.add_argument("--store", type=Path, default=RESULTS / "policies.jsonl")
    return parser.parse_args()


def _calibrate(dtype: Dtype) -> None:
    """Plans need the rates of this machine: measure them where they are not stored."""
    if matching_calibration(cache_dir(), usable_cores(), print, dtype) is None:
        print(f"measuring this machine: blendserve calibrate --dtype {dtype}", flush=True)
        command = [sys.executable, "-m", "blendserve", "calibrate", "--dtype", dtype]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def missing(settings: Sequence[Setting], entrants: Sequence[str], repeats: int, store: RunStore) -> Iterator[Cell]:
    """Runs to do: every entrant once before any is repeated, and each time another one begins."""
    for repeat in range(repeats):
        for setting in settings:
            for position in range(len(entrants)):
                cell = Cell(setting, entrants[(position + repeat) % len(entrants)])
                if len(store.runs(cell.key())) <= repeat:
                    yield cell


def run_missing(
    settings: Sequence[Setting], entrants: Sequence[str], store: RunStore, arguments: argparse.Namespace
) -> None:
    """Run and store what is not done, as far as the time goes."""
    end_s = time.monotonic() + 60 * arguments.minutes
    cells = list(missing(settings, entrants, arguments.repeats, store))
    known = [run["elapsed_s"] for s in settings for e in entrants for run in store.runs(Cell(s, e).key())]
    progress = Progress(known, len(cells))
    with tempfile.TemporaryDirectory() as directory:
        for cell in cells:
            if time.monotonic() + progress.next_s > end_s:
                print(f"no time for more: {progress}")
                return
            batch_file, most_sharing = _file_of(cell.setting, arguments.questions, Path(directory))
            outcome = _run(cell, batch_file, most_sharing)
            store.add(cell.key(), asdict(outcome))
            progress.done(outcome.elapsed_s)
            print(
                f"{cell.setting} {cell.entrant}: {outcome.elapsed_s:.1f} s; {progress}",
                flush=True,
            )


def _file_of(setting: Setting, questions: Path | None, directory: Path) -> tuple[Path, float]:
    """The batch file of a mix, and the largest share of prompt tokens that any order can share."""
    batch_file = directory / f"{setting.mix}.jsonl"
    lines = lines_of(setting, questions)
    if not batch_file.exists():
        mixes.write_batch_file(lines, batch_file)
    return batch_file, PrefixTree.from_prompts(mixes.encode(lines)).sharing


def lines_of(setting: Setting, questions: Path | None) -> list[mixes.Line]:
    if not setting.mix.startswith(TEXT):
        return token_mixes.token_lines(setting.mix, setting.scale)
    if questions is None:
        raise SystemExit(f"{setting.mix} is made of questions: name their file with --questions")
    (mix,) = [mix for mix in mixes.MIXES if TEXT + mix.name == setting.mix]
    return mixes.build(mix.scaled(setting.scale), questions)


def _run(cell: Cell, batch_file: Path, most_sharing: float) -> Outcome:
    policy, _, overlap = cell.entrant.partition("/")
    setting = cell.setting
    options = ["--policy", policy, "--overlap", overlap or "on", "--kv-memory", setting.kv_memory]
    watch = common.Watch()
    model = ["--model", setting.model] if setting.model else []
    summary = mixes.run_batch_file(batch_file, [*options, "--dtype", setting.dtype, *model])
    return outcome_of(summary, most_sharing, watch.others(), token_seconds(setting))


def token_seconds(setting: Setting) -> float:
    """What a prompt token costs by the stored calibration; 0 where there is none."""
    calibration = matching_calibration(cache_dir(), usable_cores(), print, setting.dtype)
    if calibration is None:
        return 0.0
    spec = spec_from_gguf(setting.model, GgufFile(Path(setting.model))) if setting.model else SMOLLM2_135M
    return calibration.step_cost(ModelCost.from_spec(spec, bytes_per_weight=BYTES_PER_WEIGHT[setting.dtype])).token_s


def outcome_of(summary: dict[str, Any], most_sharing: float, others: float, token_s: float) -> Outcome:
    """A run from what `--json` printed."""
    computed = summary["num_prompt_tokens"] - summary["num_cached_tokens"]
    return Outcome(
        elapsed_s=summary["makespan_s"] - summary["load_s"],
        sharing=summary["num_cached_tokens"] / summary["num_prompt_tokens"],
        most_sharing=most_sharing,
        num_shared_tokens=summary["num_cached_tokens"],
        num_recomputed_tokens=max(0, summary["num_prefill_tokens"] - computed),
        scheduling_share=summary["scheduling_share"],
        balance=summary["balance"],
        num_preemptions=summary["num_preemptions"],
        num_steps=summary["num_steps"],
        token_s=token_s,
        calibration=summary["calibration"] or "none",
        others=others,
    )


def stored(setting: Setting, entrants: Sequence[str], store: RunStore) -> dict[str, list[Outcome]]:
    """The runs of a setting by entrant; those that have none are left out."""
    runs = {entrant: store.runs(Cell(setting, entrant).key()) for entrant in entrants}
    return {entrant: [Outcome(**run) for run in found] for entrant, found in runs.items() if found}


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """A row per entrant; speed-ups are over `fcfs/off` and `dfs/off`, run by run."""
    rows = []
    for entrant, runs in outcomes.items():
        last = runs[-1]
        rows.append(
            [
                entrant,
                common.summarise([run.elapsed_s for run in runs]).text(1),
                *(_speedup(runs, outcomes.get(base)) for base in ("fcfs/off", BASE)),
                f"{last.sharing:.3f}",
                f"{last.sharing / last.most_sharing:.1%}" if last.most_sharing else "-",
                f"{last.scheduling_share:.2%}",
                f"{last.balance:.2f}",
                str(last.num_preemptions),
                str(last.num_steps),
                last.calibration,
                f"{max(run.others for run in runs):.0%}",
            ]
        )
    measured = ["seconds", "over fcfs/off", f"over {BASE}", "sharing", "of the most", "scheduling", "balance"]
    return common.table(["", *measured, "preempted", "steps", "calibration", "others"], rows)


def _speedup(runs: Sequence[Outcome], base: Sequence[Outcome] | None) -> str:
    if not base:
        return ""
    pairs = zip(base, runs, strict=False)
    return common.summarise([first.elapsed_s / run.elapsed_s for first, run in pairs]).text(2) + "x"


def gains(outcomes: dict[str, list[Outcome]], base: str = BASE) -> str:
    """Seconds that each entrant saves over the base, and by what: the parts add up.

    Overlap is the difference to the same policy without it. Fewer tokens computed again, and more shared, count for
    what a token costs by the calibration; the rest is fuller steps, and whatever the machine did. Without a run of the
    policy without overlap nobody knows the first and the last.
    """
    if base not in outcomes:
        return f"no run of {base} to compare with"
    first = _median_run(outcomes[base])
    rows = []
    for entrant, runs in outcomes.items():
        run = _median_run(runs)
        apart = _median_run(outcomes.get(f"{entrant.partition('/')[0]}/off", runs))
        overlap_s = apart.elapsed_s - run.elapsed_s
        again_s = first.token_s * (first.num_recomputed_tokens - apart.num_recomputed_tokens)
        sharing_s = first.token_s * (apart.num_shared_tokens - first.num_shared_tokens)
        all_s = first.elapsed_s - run.elapsed_s
        rest_s = all_s - overlap_s - again_s - sharing_s
        row = [entrant, *(f"{seconds:+.1f}" for seconds in (all_s, overlap_s, again_s, sharing_s, rest_s))]
        if apart is run and not entrant.endswith("/off"):
            row[2] = row[-1] = "?"
        rows.append(row)
    return common.table([f"s saved over {base}", "all", "overlap", "preemption", "sharing", "fuller steps"], rows)


def _median_run(runs: Sequence[Outcome]) -> Outcome:
    """The run of the median time; the faster of the middle two."""
    return sorted(runs, key=lambda run: run.elapsed_s)[(len(runs) - 1) // 2]


if __name__ == "__main__":
    main()

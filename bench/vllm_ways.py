"""One batch file through vLLM in five ways: `vllm run-batch`, `LLM.chat` in the order of the file and sorted, and ours
by the front door and through vLLM's scheduler. Then what a crash and a bad line cost.

Every way is a process of its own and is timed whole, loading included; ways take turns. `scripts/setup-peers vllm`
makes the environment.

    python bench/vllm_ways.py --requests 48
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

PEERS = Path(os.environ.get("BLENDSERVE_PEERS_DIR", Path.home() / ".cache/blendserve-peers"))
WAYS = ("run-batch", "file", "sorted", "ours", "ours-scheduler")
SUBJECTS = ("rivers", "metals", "birds", "bridges")
WORDS = (
    "the",
    "river",
    "of",
    "stone",
    "and",
    "metal",
    "in",
    "a",
    "city",
    "that",
    "was",
    "old",
    "with",
    "birds",
    "by",
    "night",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one way. `elapsed_s` is of the whole process."""

    way: str
    elapsed_s: float
    num_rows: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int

    @property
    def hit_rate(self) -> float:
        return self.num_cached_tokens / max(1, self.num_prompt_tokens)


def main() -> None:
    arguments = _parse()
    common.print_header()
    with tempfile.TemporaryDirectory(prefix="blendserve-bench-") as name:
        directory = Path(name)
        source = write_workload(directory / "in.jsonl", arguments.requests)
        bench = Bench(arguments, directory)
        ways = arguments.ways.split(",")
        outcomes = [bench.run(way, source) for _ in range(arguments.repeats) for way in ways]
        print(summary_table(ways, outcomes), flush=True)
        if not arguments.no_faults:
            print(f"\nkilled at three quarters of the time, and started again: {bench.killed(source)}", flush=True)
            print(f"one line of the file is no JSON: {bench.bad_line(source)}", flush=True)


def write_workload(path: Path, num_requests: int) -> Path:
    """A third each: questions behind a long shared instruction and long texts of their own, both with short answers,
    and short prompts with long answers. Shuffled; greedy, end of sequence ignored.
    """
    source = random.Random(5)
    lines = []
    for number in range(num_requests):
        kind, subject = number % 3, SUBJECTS[number // 3 % len(SUBJECTS)]
        if kind == 0:
            shared = f"You answer questions about {subject}. " + _text(random.Random(subject), 300)
            content, max_tokens = f"{shared}\nQuestion {number}: {_text(source, 10)}?", 4
        elif kind == 1:
            content, max_tokens = _text(source, 250) + f"\nSum {number} up.", 12
        else:
            content, max_tokens = f"{number}: {_text(source, 8)}", source.randrange(48, 97)
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        lines.append({"custom_id": f"id-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    source.shuffle(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _text(source: random.Random, num_words: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(num_words))


class Bench:
    """Starts the ways. All get the same limits, threads and element type."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self._arguments = arguments
        self._directory = directory
        self._python = str(PEERS / "vllm/bin/python")
        self._num_runs = 0
        threads = str(arguments.threads or len(os.sched_getaffinity(0)))
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(common.ROOT / "src"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": threads,
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }

    def run(self, way: str, source: Path) -> Outcome:
        """Run one way to its end."""
        target = self._new_target()
        started_s = time.perf_counter()
        done = subprocess.run(
            self.command(way, source, target), env=self._environment, capture_output=True, text=True, check=False
        )
        elapsed_s = time.perf_counter() - started_s
        if done.returncode:
            raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
        outcome = self._read(way, elapsed_s, done.stdout, target)
        print(f"  {way}: {elapsed_s:.1f} s, {outcome.num_rows} answers", flush=True)
        return outcome

    def command(self, way: str, source: Path, target: Path) -> list[str]:
        """The command line of a way."""
        given = self._arguments
        if way == "run-batch":
            flags = [
                f"--{name.replace('_', '-')}={value}" for name, value in self._limits().items() if value is not True
            ]
            flags += ["--enforce-eager", "--enable-prefix-caching", "--enable-prompt-tokens-details"]
            entry = [self._python, "-m", "vllm.entrypoints.launchers.run_batch"]  # what `vllm run-batch` calls
            return [*entry, "-i", str(source), "-o", str(target), *flags, "--served-model-name=tiny"]
        if way in ("file", "sorted"):
            worker = str(common.ROOT / "bench/peers/vllm_file.py")
            return [self._python, worker, str(source), way, json.dumps(self._limits())]
        scheduler = "blend" if way == "ours-scheduler" else "front"
        return [
            *(self._python, "-m", "blendserve", "run", str(source), "-o", str(target)),
            *("--engine", "vllm", "--json", "--model", given.model, "--max-model-len", str(given.max_model_len)),
            *("--max-num-seqs", str(given.max_num_seqs), "--max-num-batched-tokens", str(given.max_num_batched_tokens)),
            *("--kv-memory", f"{given.kv_memory_mib}MiB", "--vllm-arg", f"dtype={given.dtype}"),
            *("--vllm-scheduler", scheduler),
        ]

    def killed(self, source: Path) -> str:
        """kill -9 after three quarters of the time of a whole run, then the same command again: ours. run-batch writes
        its file at the end."""
        whole = self.run("ours", source)
        target = self._new_target()
        command = self.command("ours", source, target)
        process = subprocess.Popen(command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        records = target.with_name(target.name + ".journal") / "records"
        started_s = time.perf_counter()
        while process.poll() is None and time.perf_counter() - started_s < whole.elapsed_s * 0.75:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept_bytes = records.stat().st_size if records.exists() else 0
        started_s = time.perf_counter()
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=True)
        elapsed_s = time.perf_counter() - started_s
        report = json.loads(done.stdout.splitlines()[-1])
        return (
            f"ours kept {report['num_resumed']} of {report['num_succeeded']} answers ({kept_bytes} bytes) and took "
            f"{elapsed_s:.1f} s for the rest; run-batch writes its file at the end and starts from nothing"
        )

    def bad_line(self, source: Path) -> str:
        """What becomes of the good lines when one is no JSON."""
        bad = self._directory / "bad.jsonl"
        lines = source.read_text().splitlines()[:6]
        bad.write_text("\n".join([*lines[:3], '{"custom_id": "broken", ', *lines[3:]]) + "\n")
        told = []
        for way in ("run-batch", "ours"):
            target = self._new_target()
            command = self.command(way, bad, target)
            done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
            num_rows = len(target.read_text().splitlines()) if target.exists() else 0
            told.append(f"{way} exits with {done.returncode}, {num_rows} of {len(lines)} good lines answered")
        return "; ".join(told)

    def _limits(self) -> dict[str, Any]:
        given = self._arguments
        return {
            "model": given.model,
            "dtype": given.dtype,
            "max_model_len": given.max_model_len,
            "max_num_seqs": given.max_num_seqs,
            "max_num_batched_tokens": given.max_num_batched_tokens,
            "kv_cache_memory_bytes": given.kv_memory_mib << 20,
            "block_size": 32,
            "enforce_eager": True,
            "enable_prefix_caching": True,
        }

    def _new_target(self) -> Path:
        self._num_runs += 1
        return self._directory / f"out-{self._num_runs}.jsonl"

    def _read(self, way: str, elapsed_s: float, stdout: str, target: Path) -> Outcome:
        if way == "run-batch":
            return _from_rows(way, elapsed_s, target)
        report = json.loads(stdout.splitlines()[-1])
        names = ("num_succeeded", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens")
        return Outcome(way, elapsed_s, *(report[name] for name in names))


def _from_rows(way: str, elapsed_s: float, target: Path) -> Outcome:
    usages = [json.loads(line)["response"]["body"]["usage"] for line in target.read_text().splitlines()]
    cached = [(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for usage in usages]
    return Outcome(
        way,
        elapsed_s,
        len(usages),
        sum(usage["prompt_tokens"] for usage in usages),
        sum(cached),
        sum(usage["completion_tokens"] for usage in usages),
    )


def summary_table(ways: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Medians with their range; the last column compares with run-batch, repeat by repeat."""
    by_way = {way: [outcome for outcome in outcomes if outcome.way == way] for way in ways}
    first = by_way[ways[0]]
    rows = []
    for way, runs in by_way.items():
        ratios = [base.elapsed_s / run.elapsed_s for base, run in zip(first, runs, strict=True)]
        one = runs[-1]
        rows.append(
            [
                way,
                common.summarise([run.elapsed_s for run in runs]).text(1),
                f"{one.num_prompt_tokens} + {one.num_output_tokens}",
                f"{one.hit_rate:.0%}",
                common.summarise(ratios).text(2) + "x",
            ]
        )
    return common.table(["way", "makespan, seconds", "tokens in + out", "prefix hits", f"{ways[0]} takes"], rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PEERS / "weights/SmolLM2-135M-Instruct-hf"))
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ways", default=",".join(WAYS), help="of " + ", ".join(WAYS))
    parser.add_argument("--no-faults", action="store_true", help="leave out the crash and the bad line")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--kv-memory-mib", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Policies side by side on the native engine: whole runs of one blended workload, in turn, in one process.

The workload: few-shot questions with real shared prefixes (MMLU, 5 shots a subject), long generations from short
prompts, and long inputs with short answers. Reports time, prefix sharing against the most possible, scheduling share.

    python bench/policies.py --mmlu PATH/mmlu_questions.jsonl --repeats 3
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from blendserve import LLM, SamplingParams
from blendserve.planner.sorting import flatten
from blendserve.planner.tree import PrefixTree

LETTERS = "ABCD"
TOPICS = (
    "a lighthouse",
    "the first snow",
    "a lost key",
    "the night train",
    "an old map",
    "a bridge",
    "the harvest",
    "a clock",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One whole run. `sharing` and `most_sharing` are shares of prompt tokens that needed no computation."""

    policy: str
    elapsed_s: float
    sharing: float
    most_sharing: float
    scheduling_share: float
    num_preemptions: int
    num_steps: int


def main() -> None:
    arguments = _parse()
    common.print_header()
    policies = arguments.policies.split(",")
    outcomes: list[Outcome] = []
    with LLM(
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        kv_memory_bytes=arguments.kv_memory_mib << 20,
        num_threads=arguments.threads,
    ) as llm:
        prompts, params = _workload(llm, arguments)
        tree = PrefixTree.from_prompts(flatten_views(prompts))
        print(
            f"{len(prompts)} requests, {sum(map(len, prompts))} prompt tokens, "
            f"{sum(p.max_tokens or 0 for p in params)} output tokens, most sharing {tree.sharing:.3f}, "
            f"KV {arguments.kv_memory_mib} MiB\n"
        )
        for repeat in range(arguments.repeats):
            for position in range(len(policies)):
                policy = policies[(position + repeat) % len(policies)]
                outcomes.append(_run(llm, policy, prompts, params, tree.sharing))
                print(f"{repeat + 1}/{arguments.repeats} {policy}: {outcomes[-1].elapsed_s:.1f} s", flush=True)
    print("\n" + _table(policies, outcomes))


def flatten_views(prompts: list[list[int]]) -> list[Any]:
    """Prompts as arrays."""
    flat = flatten(prompts)  # type: ignore[arg-type]
    return [flat.token_ids[a:b] for a, b in zip(flat.offsets[:-1], flat.offsets[1:], strict=True)]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmlu", type=Path, required=True, help="questions, one JSON object a line")
    parser.add_argument("--policies", default="fcfs,random,dfs,paper,blend")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--subjects", type=int, default=20)
    parser.add_argument("--questions", type=int, default=8, help="per subject")
    parser.add_argument("--generations", type=int, default=80)
    parser.add_argument("--generation-tokens", type=int, default=256)
    parser.add_argument("--long-inputs", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--kv-memory-mib", type=int, default=512)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _workload(llm: LLM, arguments: argparse.Namespace) -> tuple[list[list[int]], list[SamplingParams]]:
    source = random.Random(arguments.seed)
    texts = [(text, 2) for text in _few_shot(arguments.mmlu, arguments.subjects, arguments.questions)]
    for number in range(arguments.generations):
        length = round(arguments.generation_tokens * source.uniform(0.5, 1.5))
        texts.append((f"Story {number}, about {TOPICS[number % len(TOPICS)]}:", length))
    passages = [text for text, _ in texts[: arguments.subjects * arguments.questions]]
    for number in range(arguments.long_inputs):
        words = " ".join(source.sample(passages, min(3, len(passages)))).split()
        source.shuffle(words)
        texts.append((f"Text {number}: {' '.join(words[:900])}\nSummary:", 8))
    source.shuffle(texts)
    encoded = llm.model.tokenizer.encode_batch([text for text, _ in texts])
    params = [SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.0) for _, count in texts]
    return [ids.tolist() for ids in encoded], params


def _few_shot(path: Path, num_subjects: int, num_questions: int) -> list[str]:
    """Prompts of five solved questions and an open one, `num_questions` per subject."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = []
    for subject in sorted({row["subject"] for row in rows})[:num_subjects]:
        solved = [row for row in rows if row["subject"] == subject and row["split"] == "dev"][:5]
        head = f"Questions about {subject.replace('_', ' ')}.\n\n" + "".join(
            _question(row, row["answer"]) for row in solved
        )
        asked = [row for row in rows if row["subject"] == subject and row["split"] == "test"][:num_questions]
        prompts += [head + _question(row, "").rstrip() for row in asked]
    return prompts


def _question(row: dict[str, Any], answer: str) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question']}\n{choices}\nAnswer: {answer}\n\n"


def _run(llm: LLM, policy: str, prompts: list[list[int]], params: list[SamplingParams], most_sharing: float) -> Outcome:
    llm.policy = policy
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    elapsed_s = time.perf_counter() - started
    assert all(output.error is None for output in outputs)
    stats = llm.stats
    computed = stats.num_prefill_tokens
    return Outcome(
        policy=policy,
        elapsed_s=elapsed_s,
        sharing=1 - computed / sum(map(len, prompts)),
        most_sharing=most_sharing,
        scheduling_share=stats.scheduling_share,
        num_preemptions=stats.num_preemptions,
        num_steps=stats.num_steps,
    )


def _table(policies: list[str], outcomes: list[Outcome]) -> str:
    by_policy = {policy: [run for run in outcomes if run.policy == policy] for policy in policies}
    slowest = [run.elapsed_s for run in by_policy[policies[0]]]
    rows = []
    for policy, runs in by_policy.items():
        speedups = [base / run.elapsed_s for base, run in zip(slowest, runs, strict=True)]
        last = runs[-1]
        rows.append(
            [
                policy,
                common.summarise([run.elapsed_s for run in runs]).text(1),
                common.summarise(speedups).text(2) + "x",
                f"{last.sharing:.3f}",
                f"{last.sharing / last.most_sharing:.1%}" if last.most_sharing else "-",
                f"{last.scheduling_share:.2%}",
                str(last.num_preemptions),
                str(last.num_steps),
            ]
        )
    header = ["", "seconds", f"against {policies[0]}", "sharing", "of the most", "scheduling", "preemptions", "steps"]
    return common.table(header, rows)


if __name__ == "__main__":
    main()

"""What grammars cost the native engine: `python bench/structured.py`; beside vLLM: `... --peer vllm`.

Requests with a schema each, all at once, against the same requests without one, in turn. Both runs are given the same
tokens whatever they sample, so they differ in masks alone: filling them, waiting for them, sampling under them and
following what came. Schemas are of the kinds that extraction uses.

With `--peer vllm` both engines answer the same prompts under the same schemas, and then freely, with as many tokens
each. Runs take turns and are timed whole; the first of each kind is a warm-up. `scripts/setup-peers vllm` makes the
environment.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import common
import numpy as np
from numpy.typing import NDArray
from peer_lineup import entrant as entrant_of
from peer_process import PeerProcess

from blendserve.config import DTYPES, Dtype, EngineConfig
from blendserve.engine.constrained import GrammarConstraints
from blendserve.engine.fake import FifoPolicy
from blendserve.engine.grammar import GrammarCompiler
from blendserve.engine.limits import resolve_limits
from blendserve.engine.loop import EngineLoop
from blendserve.engine.step import Int32s, PromptResult, StepPlan, StepResult
from blendserve.engines.native.loop import open_executor, open_loop
from blendserve.executors.native import NativeExecutor
from blendserve.host import cache_dir, usable_cores
from blendserve.models.hub import resolve
from blendserve.models.load import LoadedModel, load_model
from blendserve.request import Request, SamplingParams, StructuredOutputs, TokenIds

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "employed": {"type": "boolean"},
        "city": {"enum": ["Paris", "London", "Berlin", "Madrid", "Rome"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 16}, "maxItems": 4},
    },
    "required": ["name", "age", "employed", "city", "tags"],
    "additionalProperties": False,
}
INVOICE = {
    "type": "object",
    "properties": {
        "number": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        "date": {"type": "string", "format": "date"},
        "lines": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"item": {"type": "string", "maxLength": 24}, "price": {"type": "number", "minimum": 0}},
                "required": ["item", "price"],
                "additionalProperties": False,
            },
        },
        "note": {"type": ["string", "null"], "maxLength": 60},
    },
    "required": ["number", "date", "lines", "note"],
    "additionalProperties": False,
}
REVIEW = {
    "type": "object",
    "properties": {
        "sentiment": {"enum": ["positive", "negative", "mixed"]},
        "score": {"type": "integer", "minimum": 1, "maximum": 5},
        "summary": {"type": "string", "maxLength": 120},
    },
    "required": ["sentiment", "score", "summary"],
    "additionalProperties": False,
}
Floats = NDArray[np.float64]
SCHEMAS = (PERSON, INVOICE, REVIEW)


class ForcedExecutor:
    """The native executor, whose tokens are replaced by those that were sampled in an earlier run."""

    needs_tokens = True

    def __init__(self, inner: NativeExecutor) -> None:
        self.num_blocks, self.block_size = inner.num_blocks, inner.block_size
        self.eos_token_ids = inner.eos_token_ids
        self.forced: Mapping[int, TokenIds] = {}
        self._inner = inner
        self._request_by_slot: dict[int, Request] = {}

    def admit(self, slot: int, request: Request) -> None:
        self._request_by_slot[slot] = request
        self._inner.admit(slot, request)

    def release(self, slot: int) -> None:
        self._inner.release(slot)

    def kept_with(self, request: Request) -> Hashable | None:
        return self._inner.kept_with(request)

    def prompt_result(self, slot: int, blocks: Int32s) -> PromptResult:
        return self._inner.prompt_result(slot, blocks)

    def close(self) -> None:
        self._inner.close()

    def execute(self, plan: StepPlan) -> StepResult:
        result = self._inner.execute(plan)
        return replace(result, token_ids=np.fromiter(self._tokens(plan), np.int32)) if self.forced else result

    def _tokens(self, plan: StepPlan) -> Iterator[int]:
        ends = (plan.num_computed_tokens + plan.num_scheduled_tokens)[plan.is_sampled]
        for slot, end in zip(plan.slots[plan.is_sampled].tolist(), ends.tolist(), strict=True):
            request = self._request_by_slot[slot]
            yield int(self.forced[request.index][end - request.num_prompt_tokens])


def requests_of(model: LoadedModel, count: int, max_tokens: int) -> list[Request]:
    """Prompts that are all different, their schemas in turn."""
    requests = []
    for index in range(count):
        schema = SCHEMAS[index % len(SCHEMAS)]
        messages = [{"role": "user", "content": f"Invent example {index} {'data ' * (index % 7)}as JSON."}]
        prompt = model.tokenizer.encode(model.tokenizer.apply_chat_template(messages), add_special_tokens=False)
        structure = StructuredOutputs(json=json.dumps(schema))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, structured_outputs=structure)
        requests.append(Request(index, prompt, len(prompt), sampling, max_tokens, seed=index))
    return requests


def without_schema(requests: list[Request], forced: Mapping[int, TokenIds]) -> list[Request]:
    """The same, free, as long as what is forced."""
    lengths = [len(forced[request.index]) for request in requests]
    return [
        replace(
            request,
            max_output_tokens=length,
            sampling=replace(request.sampling, structured_outputs=None, ignore_eos=True),
        )
        for request, length in zip(requests, lengths, strict=True)
    ]


def step_times(loop: EngineLoop, requests: list[Request]) -> Floats:
    """Seconds of every step of one run that holds decodes alone, the loop's own work included."""
    outputs = list(loop.run(requests, FifoPolicy(len(requests))))
    assert all(output.error is None for output in outputs)
    steps = loop.stats.steps.columns()
    times = steps["elapsed_s"] + np.frombuffer(loop.stats.scheduling_s_by_step)
    decodes: Floats = times[steps["num_prefill_tokens"] == 0]
    return decodes


def measure(model: LoadedModel, count: int, max_tokens: int, dtype: Dtype, num_rounds: int) -> list[str]:
    """A row: with and without, their ratio, and where the difference went.

    Steps of the two runs are the same work one by one. Of each the fastest of all rounds counts: neighbours on the
    machine only ever slow a step down.
    """
    config = resolve_limits(EngineConfig(max_num_seqs=count, max_model_len=1024, dtype=dtype), model.spec)
    inner = open_executor(model, config)
    executor = ForcedExecutor(inner)
    compiler = GrammarCompiler(model.tokenizer, model.spec.vocab_size, model.spec.eos_token_ids)
    constraints = GrammarConstraints(compiler, count, inner.num_threads)
    with closing(EngineLoop(executor, config, constraints=constraints)) as loop:
        constrained = requests_of(model, count, max_tokens)
        forced = {output.index: output.token_ids for output in loop.run(constrained, FifoPolicy(count))}
        compile_s = loop.stats.grammar_compile_s
        executor.forced = forced
        free = without_schema(constrained, forced)
        times: dict[str, list[Floats]] = {"free": [], "constrained": []}
        for _ in range(num_rounds):
            times["free"].append(step_times(loop, free))
            times["constrained"].append(step_times(loop, constrained))
        stats = loop.stats
        off, on = (np.min(np.stack(rounds), axis=0) for rounds in times.values())
        ratios = [float(b.sum() / a.sum()) for a, b in zip(times["free"], times["constrained"], strict=True)]
        return [
            f"{count}, {dtype}",
            f"{len(off)}",
            f"{1e3 * off.mean():.2f}",
            f"{1e3 * on.mean():.2f}",
            f"{on.sum() / off.sum():.3f}",
            common.summarise(ratios).text(3),
            f"{1e3 * stats.grammar_mask_s / stats.num_steps:.2f}",
            f"{1e3 * stats.grammar_wait_s / stats.num_steps:.2f}",
            f"{1e3 * compile_s:.0f}",
        ]


Timed = tuple[float, list[int]]
"""Seconds of a run, and the tokens of each answer."""


class Ours:
    """The native engine in this process, timed whole."""

    def __init__(self, model: LoadedModel, requests: list[Request], dtype: Dtype) -> None:
        config = resolve_limits(EngineConfig(max_num_seqs=len(requests), max_model_len=1024, dtype=dtype), model.spec)
        self.name = f"BlendServe, {dtype}"
        self._requests = requests
        self._loop = open_loop(model, config, open_executor(model, config))

    def constrained(self) -> Timed:
        return self._timed(self._requests)

    def free(self, lengths: list[int]) -> Timed:
        forced = {index: np.zeros(length, np.int32) for index, length in enumerate(lengths)}
        return self._timed(without_schema(self._requests, forced))

    def _timed(self, requests: list[Request]) -> Timed:
        started = time.perf_counter()
        outputs = sorted(self._loop.run(requests, FifoPolicy(len(requests))), key=lambda output: output.index)
        return time.perf_counter() - started, [len(output.token_ids) for output in outputs]

    def close(self) -> None:
        self._loop.close()


class Peer:
    """An engine in a process of its own."""

    def __init__(self, name: str, model: LoadedModel, path: Path, requests: list[Request]) -> None:
        question = model.tokenizer.encode("The capital of France is", add_special_tokens=False).tolist()
        entrant = entrant_of(name, path, usable_cores(), {})
        self._process = PeerProcess(entrant, question, 4, timeout_s=300)
        self.name = f"{name} {self._process.description['version']}, {self._process.description['precision']}"
        self._prompts = [request.prompt_token_ids.tolist() for request in requests]
        self._schemas = [str((request.sampling.structured_outputs or StructuredOutputs()).json) for request in requests]
        self._max_tokens = max(request.max_output_tokens for request in requests)

    def constrained(self) -> Timed:
        run, made = self._process.run_constrained(self._prompts, self._schemas, self._max_tokens)
        return run.elapsed_s, made

    def free(self, lengths: list[int]) -> Timed:
        return self._process.run(self._prompts, lengths).elapsed_s, lengths

    def close(self) -> None:
        self._process.close()


def against(entrants: Sequence[Ours | Peer], num_rounds: int) -> list[list[str]]:
    """A row for each engine: the fastest run with schemas over the fastest without."""
    lengths = {entrant.name: entrant.constrained()[1] for entrant in entrants}
    times: dict[str, list[tuple[float, float]]] = {entrant.name: [] for entrant in entrants}
    for number in range(num_rounds + 1):
        for entrant in entrants:
            free_s, _ = entrant.free(lengths[entrant.name])
            constrained_s, made = entrant.constrained()
            assert made == lengths[entrant.name] or entrant.name.startswith("vllm"), "ours gives the same each time"
            if number:
                times[entrant.name].append((free_s, constrained_s))
    rows = []
    for name, runs in times.items():
        free_s, constrained_s = (min(run[side] for run in runs) for side in (0, 1))
        ratios = common.summarise([constrained / free for free, constrained in runs])
        num_tokens, num_steps = sum(lengths[name]), max(lengths[name])
        more = f"{1e3 * (constrained_s - free_s) / num_steps:.2f}"
        rows.append(
            [
                *(name, f"{num_tokens}", f"{free_s:.2f}", f"{constrained_s:.2f}", f"{constrained_s / free_s:.3f}"),
                *(ratios.text(3), more, f"{num_tokens / constrained_s:.0f}"),
            ]
        )
    return rows


def beside_peer(model: LoadedModel, path: Path, arguments: argparse.Namespace) -> str:
    requests = requests_of(model, arguments.requests[0], arguments.max_tokens)
    with ExitStack() as stack:
        entrants: list[Ours | Peer] = [
            stack.enter_context(closing(Ours(model, requests, arguments.dtype))),
            stack.enter_context(closing(Peer(arguments.peer, model, path, requests))),
        ]
        rows = against(entrants, arguments.rounds)
    columns = ["engine", "tokens", "free, s", "with schemas, s", "ratio", "ratio of runs", "ms more per step"]
    return common.table([*columns, "tokens/s with schemas"], rows)


def main() -> None:
    """Print a row for each number of sequences, or for each engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[64])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--peer", choices=("vllm",))
    arguments = parser.parse_args()
    common.print_header()
    files = resolve(None, cache_dir())
    model = load_model(files)
    if arguments.peer:
        print(beside_peer(model, files.path, arguments))
        return
    rows = [
        measure(model, count, arguments.max_tokens, arguments.dtype, arguments.rounds) for count in arguments.requests
    ]
    columns = ["sequences", "decode steps", "free, ms/step", "with schemas, ms/step", "ratio", "ratio of whole rounds"]
    print(common.table([*columns, "masks, ms/step", "waited, ms/step", "compile, ms"], rows))


if __name__ == "__main__":
    main()

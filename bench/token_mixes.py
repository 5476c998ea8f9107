"""Mixes that are given by token counts alone: the same jobs for the simulator and, with random tokens, for the engine.

`pool` is a file of questions behind one long shared prefix, long generations and unshared long prompts. `exam`,
`digest` and `all` have the shape of the text mixes in `mixes.py`. `essays`, `reports` and `library` decode for so long
that reading KV takes at least half as long as computing; each is about ten minutes of work for `fcfs` on two cores,
with int8 weights and 512 MiB of KV memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from mixes import Line

from blendserve.models.known import SMOLLM2_135M
from blendserve.simulator.workloads.workload import Workload

FIRST_ORDINARY_TOKEN = 64
"""Lower ones control the model."""


class Part(NamedTuple):
    """Requests of one kind. `prefix` groups requests that share their first `num_prefix_tokens`; -1: nothing."""

    prompts: list[int]
    outputs: list[int]
    prefix: list[int]
    num_prefix_tokens: int = 0


def questions(rng: np.random.Generator, groups: int, per_group: int, prefix: int, own: int, answer: int) -> Part:
    count = groups * per_group
    own_tokens = rng.integers(own // 2, own * 3 // 2, count)
    groups_of = np.arange(count) // per_group
    return Part((prefix + own_tokens).tolist(), [answer] * count, groups_of.tolist(), prefix)


def alone(prompts: Sequence[int], outputs: Sequence[int]) -> Part:
    return Part(list(prompts), list(outputs), [-1] * len(prompts))


def pool(rng: np.random.Generator) -> list[Part]:
    return [
        questions(rng, 1, 160, 1040, 24, 6),
        alone([100] * 70, rng.integers(400, 1001, 70).tolist()),
        alone([1200] * 60, [24] * 60),
    ]


def generations(rng: np.random.Generator, count: int) -> Part:
    return alone([10] * count, rng.integers(160, 481, count).tolist())


def exam(rng: np.random.Generator) -> list[Part]:
    return [questions(rng, 57, 8, 480, 80, 2), generations(rng, 220)]


def digest(rng: np.random.Generator) -> list[Part]:
    return [generations(rng, 220), alone([1300] * 56, [16] * 56)]


def everything(rng: np.random.Generator) -> list[Part]:
    return [questions(rng, 38, 8, 480, 80, 2), generations(rng, 180), alone([1300] * 28, [16] * 28)]


def long_generations(rng: np.random.Generator, count: int) -> Part:
    return alone([100] * count, rng.integers(600, 2201, count).tolist())


def essays(rng: np.random.Generator) -> list[Part]:
    return [questions(rng, 16, 48, 900, 60, 4), long_generations(rng, 245)]


def reports(rng: np.random.Generator) -> list[Part]:
    return [alone([1500] * 210, [24] * 210), long_generations(rng, 210)]


def library(rng: np.random.Generator) -> list[Part]:
    return [questions(rng, 12, 32, 900, 60, 4), alone([1500] * 114, [24] * 114), long_generations(rng, 190)]


MIXES: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    "pool": pool,
    "exam": exam,
    "digest": digest,
    "all": everything,
    "essays": essays,
    "reports": reports,
    "library": library,
}
"""By name: the parts, put end to end in the file or shuffled."""
GROUPED = ("exam", "digest")
"""Mixes whose file holds one kind after the other; the others are shuffled."""
BALANCED = ("essays", "reports", "library")


def parts_of(name: str, scale: float = 1.0, seed: int = 0) -> list[Part]:
    """The parts of a mix, each with the first `scale` of its requests."""
    parts = MIXES[name](np.random.default_rng(seed))
    return parts if scale == 1.0 else [_scaled(part, scale) for part in parts]


def _scaled(part: Part, scale: float) -> Part:
    """The first ones: as many of each prefix as in the whole, and fewer prefixes."""
    count = max(1, round(len(part.prompts) * scale))
    return Part(part.prompts[:count], part.outputs[:count], part.prefix[:count], part.num_prefix_tokens)


def workload_of(name: str, seed: int = 0, scale: float = 1.0) -> Workload:
    """A mix as a job whose output lengths are known, as they are where the end of sequence is ignored."""
    parts = parts_of(name, scale, seed)
    prompts, outputs, prefix = (
        np.concatenate([np.array(part[column], dtype=np.int64) for part in parts]) for column in range(3)
    )
    kind = np.repeat(np.arange(len(parts)), [len(part.prompts) for part in parts])
    shared = np.array([part.num_prefix_tokens for part in parts])[kind]
    rows = _file_order(name, len(kind), seed)
    prompts, outputs, prefix, kind, shared = (column[rows] for column in (prompts, outputs, prefix, kind, shared))
    order = np.lexsort((prefix, kind))
    same = (kind[order[1:]] == kind[order[:-1]]) & (prefix[order[1:]] == prefix[order[:-1]]) & (prefix[order[1:]] >= 0)
    return Workload(
        name=name,
        num_prompt_tokens=prompts,
        num_output_tokens=outputs,
        known_output_tokens=outputs,
        kind=kind,
        kinds=tuple(str(number) for number in range(len(parts))),
        order=order,
        lcp=np.append(0, np.where(same, shared[order[1:]], 0)),
        max_output_tokens=outputs,
    )


def _file_order(name: str, count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where in the parts each line of the file stands."""
    rng = np.random.default_rng(seed)
    MIXES[name](rng)
    return np.arange(count) if name in GROUPED else rng.permutation(count)


def token_lines(name: str, scale: float = 1.0, seed: int = 0) -> list[Line]:
    """The requests of a mix in the order of its file, with random tokens; those of one prefix begin alike."""
    rng = np.random.default_rng(seed + 2)

    def tokens(count: int) -> list[int]:
        drawn: list[int] = rng.integers(FIRST_ORDINARY_TOKEN, SMOLLM2_135M.vocab_size, count).tolist()
        return drawn

    lines = []
    for part in parts_of(name, scale, seed):
        prefixes = {group: tokens(part.num_prefix_tokens) for group in dict.fromkeys(part.prefix) if group >= 0}
        for num_tokens, num_outputs, group in zip(part.prompts, part.outputs, part.prefix, strict=True):
            prefix = prefixes.get(group, [])
            lines.append(Line([*prefix, *tokens(num_tokens - len(prefix))], num_outputs))
    return [lines[row] for row in _file_order(name, len(lines), seed)]

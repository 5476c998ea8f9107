"""A job without tokens: lengths, and the sorted order with the prefixes that neighbours share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blendserve.config import BLOCK_SIZE
from blendserve.costs.model_cost import CostModel, WorkloadCost
from blendserve.simulator.workloads.traces import Int64s, Trace


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in file order, and their prompts in lexicographic order.

    Shapes: `num_prompt_tokens`, `num_output_tokens`, `known_output_tokens` (-1: not known beforehand), `kind` (index
    into `kinds`) int64[n], file order. `order` int64[n]: file rows in sorted order; `lcp` int64[n]: tokens that sorted
    prompt i shares with the one before it. `max_output_tokens` int64[n]: what requests may take at most; None:
    unlimited.
    """

    name: str
    num_prompt_tokens: Int64s
    num_output_tokens: Int64s
    known_output_tokens: Int64s
    kind: Int64s
    kinds: tuple[str, ...]
    order: Int64s
    lcp: Int64s
    max_output_tokens: Int64s | None = None

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)

    @property
    def num_tokens(self) -> int:
        """Input and output tokens: what throughput counts."""
        return int(self.num_prompt_tokens.sum() + self.num_output_tokens.sum())

    @property
    def num_shared_tokens(self) -> Int64s:
        """Prompt tokens that a depth-first walk finds in full KV blocks. Shapes: int64[n], sorted order."""
        return np.minimum(self.lcp, self.num_prompt_tokens[self.order] - 1) // BLOCK_SIZE * BLOCK_SIZE

    @property
    def sharing(self) -> float:
        """Share of all prompt tokens that a depth-first walk finds in full KV blocks: the most an engine can reach."""
        return float(self.num_shared_tokens.sum() / max(1, self.num_prompt_tokens.sum()))

    def cost(self, model: CostModel) -> WorkloadCost:
        """Resource seconds of the whole job, at its optimal sharing."""
        prompts, outputs = self.num_prompt_tokens[self.order], self.num_output_tokens[self.order]
        return model.total(prompts, outputs, self.num_shared_tokens)

    def subset(self, rows: Int64s) -> Workload:
        """The job of some file rows, renumbered in their given order; `lcp` becomes that of the remaining
        neighbours."""
        new_row = np.full(len(self), -1, dtype=np.int64)
        new_row[rows] = np.arange(len(rows))
        positions = np.flatnonzero(new_row[self.order] >= 0)
        lcp = np.zeros(len(rows), dtype=np.int64)
        if len(rows) > 1:
            # The prefix shared across a gap is the least of the shared prefixes inside it.
            lcp[1:] = np.minimum.reduceat(self.lcp[: positions[-1] + 1], positions[:-1] + 1)
        return Workload(
            name=self.name,
            num_prompt_tokens=self.num_prompt_tokens[rows],
            num_output_tokens=self.num_output_tokens[rows],
            known_output_tokens=self.known_output_tokens[rows],
            kind=self.kind[rows],
            kinds=self.kinds,
            order=new_row[self.order[positions]],
            lcp=lcp,
            max_output_tokens=None if self.max_output_tokens is None else self.max_output_tokens[rows],
        )


def mix(name: str, traces: Sequence[Trace], rng: np.random.Generator) -> Workload:
    """Shuffle traces into one job. Every trace is a subtree of its own: it begins with its own system prompt."""
    sizes = [len(trace) for trace in traces]
    kind = np.repeat(np.arange(len(traces)), sizes)
    prompts = np.concatenate([trace.num_prompt_tokens for trace in traces])
    outputs = np.concatenate([trace.num_output_tokens for trace in traces])
    is_known = np.repeat([trace.has_known_outputs for trace in traces], sizes)
    prefix = np.concatenate([trace.prefix for trace in traces])
    own = np.concatenate([np.append(trace.prefix_tokens, trace.num_system_tokens)[trace.prefix] for trace in traces])
    system = np.repeat([trace.num_system_tokens for trace in traces], sizes)

    rows = rng.permutation(len(kind))  # file row of every trace row
    order = np.lexsort((rows, prefix, kind))
    before = order[:-1]
    after = order[1:]
    lcp = np.zeros(len(order), dtype=np.int64)
    same_prefix = (prefix[after] == prefix[before]) & (prefix[after] >= 0)
    lcp[1:] = np.where(kind[after] != kind[before], 0, np.where(same_prefix, own[after], system[after]))

    file_order = np.argsort(rows, kind="stable")
    return Workload(
        name=name,
        num_prompt_tokens=prompts[file_order],
        num_output_tokens=outputs[file_order],
        known_output_tokens=np.where(is_known, outputs, -1)[file_order],
        kind=kind[file_order],
        kinds=tuple(trace.name for trace in traces),
        order=rows[order],
        lcp=lcp,
    )

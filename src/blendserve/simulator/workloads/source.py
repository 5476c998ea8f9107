"""A workload as the requests that an engine takes: no tokens, but prompt blocks that are equal where prompts are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blendserve.config import BLOCK_SIZE
from blendserve.planner.sorting import flatten, sort_prompts
from blendserve.planner.tree import PrefixTree
from blendserve.request import Request, SamplingParams, TokenIds
from blendserve.simulator.workloads.traces import Int64s
from blendserve.simulator.workloads.workload import Workload

_NO_TOKENS: TokenIds = np.zeros(0, dtype=np.int32)
_SAMPLING = SamplingParams(max_tokens=None, ignore_eos=True)


class WorkloadSource:
    """Builds each `Request` when the engine asks for it; its `max_output_tokens` is the true length, which ends it."""

    def __init__(self, workload: Workload, tree: PrefixTree, *, block_size: int = BLOCK_SIZE) -> None:
        self._prompts = workload.num_prompt_tokens.tolist()
        self._outputs = workload.num_output_tokens.tolist()
        self._tree = tree
        self._block_size = block_size

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int, /) -> Request:
        return Request(
            index=index,
            prompt_token_ids=_NO_TOKENS,
            num_prompt_tokens=self._prompts[index],
            sampling=_SAMPLING,
            max_output_tokens=self._outputs[index],
            block_keys=self._tree.block_keys(index, self._block_size),
        )


def workload_from_prompts(
    name: str, prompts: Sequence[TokenIds], num_output_tokens: Int64s, known_output_tokens: Int64s | None = None
) -> Workload:
    """A job of real prompts, so that a batch file can be simulated. Outputs are not known beforehand unless given."""
    order, lcp, lengths = sort_prompts(flatten(prompts))
    num_prompt_tokens = np.empty(len(prompts), dtype=np.int64)
    num_prompt_tokens[order] = lengths
    return Workload(
        name=name,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=np.asarray(num_output_tokens, dtype=np.int64),
        known_output_tokens=np.full(len(prompts), -1) if known_output_tokens is None else known_output_tokens,
        kind=np.zeros(len(prompts), dtype=np.int64),
        kinds=(name,),
        order=order,
        lcp=lcp,
    )


def prefix_tree(workload: Workload) -> PrefixTree:
    """The tree of the workload's prompts."""
    lengths = workload.num_prompt_tokens[workload.order]
    return PrefixTree.from_sorted(workload.order, workload.lcp, lengths)

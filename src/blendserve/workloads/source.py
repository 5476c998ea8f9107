"""A workload as the requests that an engine takes: no tokens, but prompt blocks that are equal where prompts are."""

from __future__ import annotations

import numpy as np

from blendserve.config import BLOCK_SIZE
from blendserve.planner.base import RequestTable
from blendserve.planner.tree import PrefixTree
from blendserve.request import Request, SamplingParams, TokenIds
from blendserve.workloads.workload import Workload

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


def prefix_tree(workload: Workload) -> PrefixTree:
    """The tree of the workload's prompts."""
    lengths = workload.num_prompt_tokens[workload.order]
    return PrefixTree.from_sorted(workload.order, workload.lcp, lengths)


def request_table(workload: Workload, *, max_output_tokens: int) -> RequestTable:
    """What a planner may know: prompts, a common cap, and the outputs that are fixed beforehand."""
    cap = np.maximum(max_output_tokens, workload.known_output_tokens)
    return RequestTable(workload.num_prompt_tokens, cap, workload.known_output_tokens)

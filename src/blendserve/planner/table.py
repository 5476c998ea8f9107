"""From what users ask for to what a planner needs to know: rows of a `RequestTable`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from blendserve.planner.base import RequestTable
from blendserve.planner.structures import most_tokens
from blendserve.request import SamplingParams, StructuredOutputs


def known_output_tokens(sampling: SamplingParams, max_output_tokens: int) -> int:
    """The exact output length where the request fixes it, else -1: nothing can stop it early, or nothing may."""
    if sampling.structured_outputs is not None:  # a complete grammar ends an answer whatever else is asked
        return -1
    can_stop = not sampling.ignore_eos or bool(sampling.stop) or bool(sampling.stop_token_ids)
    return -1 if can_stop and sampling.min_tokens < max_output_tokens else max_output_tokens


def most_output_tokens(sampling: SamplingParams, max_output_tokens: int) -> int:
    """The limit of a request, less where its structure allows no more."""
    structure = sampling.structured_outputs
    bound = None if structure is None else most_tokens(structure)
    return max_output_tokens if bound is None else min(max_output_tokens, bound)


def request_table(num_prompt_tokens: Iterable[int], limits: Iterable[tuple[SamplingParams, int]]) -> RequestTable:
    """Collect rows from prompt lengths and, aligned with them, sampling parameters and output limits (tokens)."""
    known, most, structures = [], [], []
    number_by_structure: dict[StructuredOutputs | None, int] = {None: 0}
    for sampling, max_output_tokens in limits:
        known.append(known_output_tokens(sampling, max_output_tokens))
        most.append(most_output_tokens(sampling, max_output_tokens))
        structures.append(number_by_structure.setdefault(sampling.structured_outputs, len(number_by_structure)))
    return RequestTable(
        num_prompt_tokens=np.fromiter(num_prompt_tokens, np.int64),
        max_output_tokens=np.array(most, np.int64),
        known_output_tokens=np.array(known, np.int64),
        structure=np.array(structures, np.int64) if any(structures) else None,
    )

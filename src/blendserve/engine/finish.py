"""When a sequence has ended, and why: vectorised over the rows that sampled a token in this step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from blendserve.engine.sequence import Int32s, Int64s, SequenceTable
from blendserve.request import Request, TokenIds

StopChecker = Callable[[Request, TokenIds], str | None]
"""Given a request and its output tokens so far, the stop string that its text now contains, if any."""

EOS_STOPS = 1  # the model's end-of-sequence tokens end it
OTHER_STOPS = 2  # stop_token_ids or stop strings have to be looked at
GRAMMAR_STOPS = 4  # a grammar says what may come, and when it is complete

StopReason = int | str | None


def stop_rules_of(request: Request, has_stop_checker: bool) -> int:
    """Sum of EOS_STOPS, OTHER_STOPS and GRAMMAR_STOPS that apply to `request`."""
    sampling = request.sampling
    is_watched = bool(sampling.stop_token_ids) or (has_stop_checker and bool(sampling.stop))
    return (
        (0 if sampling.ignore_eos else EOS_STOPS)
        + (OTHER_STOPS if is_watched else 0)
        + (GRAMMAR_STOPS if sampling.structured_outputs is not None else 0)
    )


def stopped_rows(
    table: SequenceTable,
    rows: Int64s,
    token_ids: Int32s,
    eos_token_ids: tuple[int, ...],
    stop_checker: StopChecker | None,
) -> dict[int, StopReason]:
    """Rows of `rows`, which just got `token_ids`, that a stop rule ends, with the stop token or string (None: end of
    sequence). No rule acts before a sequence has `min_tokens`. Shapes: `rows`, `token_ids` [number of sampled entries].
    """
    rules = table.stop_rules[rows]
    if not rules.any():
        return {}
    rules[table.num_output_tokens[rows] < table.min_output_tokens[rows]] = 0
    stopped: dict[int, StopReason] = {}
    for position in np.flatnonzero(rules & OTHER_STOPS):
        row = int(rows[position])
        request = table.sequence(row).request
        token = int(token_ids[position])
        if token in request.sampling.stop_token_ids:
            stopped[row] = token
        elif stop_checker is not None and request.sampling.stop:
            stop = stop_checker(request, table.output_token_ids(row))
            if stop is not None:
                stopped[row] = stop
    for eos in eos_token_ids:
        for row in rows[(token_ids == eos) & ((rules & EOS_STOPS) != 0)].tolist():
            stopped[row] = None
    return stopped

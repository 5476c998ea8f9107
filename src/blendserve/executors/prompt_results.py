"""What executors with real states give of a prompt: log probabilities as values, and pooled states as embeddings."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendserve.models.pooling import Pooling
from blendserve.request import EmbeddingParams, Request, TokenIds, TokenLogprob

Floats = NDArray[np.float32]


_LOGPROB_BYTES, _TOP_BYTES, _STATE_BYTES, _SUM_BYTES = 4, 8, 4, 8


def kept_bytes_per_block(hidden_size: int, block_size: int, num_logprobs: int, pooling: Pooling | None) -> int:
    """Memory beside a block's KV, at most, where prompts are scored with so many alternatives (-1: none is), or pooled
    (None: none is). The log probability of the token behind a block needs the state of the block's last one.
    """
    scored = hidden_size * _STATE_BYTES + block_size * (_LOGPROB_BYTES + num_logprobs * _TOP_BYTES)
    pooled = hidden_size * _SUM_BYTES if pooling is not None and pooling.kind == "mean" else 0
    return (scored if num_logprobs >= 0 else 0) + pooled


def kept_with(request: Request, pooling: Pooling) -> Hashable | None:
    """What a request's blocks hold beside KV: see `Executor.kept_with`. The state of the last token needs nothing:
    every sequence computes it itself."""
    if request.sampling.prompt_logprobs is not None:
        return ("logprobs", request.sampling.prompt_logprobs)
    return "states" if request.embedding is not None and pooling.kind == "mean" else None


def token_logprobs(
    token_ids: TokenIds, logprobs: NDArray[Any], top_ids: NDArray[Any], top_logprobs: NDArray[Any]
) -> tuple[TokenLogprob | None, ...]:
    """Arrays as values; nothing for the first token. Shapes: [n], [n], [n, k], [n, k]; ids of -1 stand for nothing."""
    rows = zip(token_ids.tolist(), logprobs.tolist(), top_ids.tolist(), top_logprobs.tolist(), strict=True)
    found: list[TokenLogprob | None] = [
        TokenLogprob(token, logprob, tuple((one, of_one) for one, of_one in zip(ids, values, strict=True) if one >= 0))
        for token, logprob, ids, values in rows
    ]
    return (None, *found[1:])


def embedding_of(pooled: NDArray[Any], wanted: EmbeddingParams, pooling: Pooling) -> Floats:
    """A vector of the dimensions that were asked for, of length 1 where the model says so. Shapes: [hidden_size]."""
    vector = pooled[: wanted.dimensions].astype(np.float64)
    if pooling.normalises:
        length = float(np.sqrt((vector * vector).sum()))
        vector = vector / max(length, 1e-12)
    return vector.astype(np.float32)

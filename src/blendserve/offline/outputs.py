"""What `LLM.generate` returns: the shape of vLLM's offline API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blendserve.errors import BlendServeError
from blendserve.request import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice. `text` excludes a matched stop string; `token_ids` holds every sampled token.

    `cumulative_logprob` and `logprobs` (one entry per token) are None unless the request asked for log probabilities.
    `stop_reason` is the stop string or stop token id that ended the choice, None for end of text or length.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its `n` choices. `num_cached_tokens` is how many prompt tokens of the first choice were
    prefix-cache hits. `error` tells why a request could not be served; then every choice has finish_reason "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int
    finished: bool = True
    error: BlendServeError | None = None

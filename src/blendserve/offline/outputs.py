"""What `LLM.generate` returns: the shape of vLLM's offline API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blendserve.errors import BlendServeError
from blendserve.request import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer to a prompt; there are `n` of them.

    - `text`: the answer, without the stop string or stop token that ended it.
    - `token_ids`: every sampled token, a final stop token included.
    - `finish_reason`: "stop", "length" (`max_tokens` or the context is used up), "error" or "cancelled".
    - `stop_reason`: the stop string or stop token that ended the answer. None: the model's end of text, or the length.
    - `cumulative_logprob`, `logprobs` (one entry per token): None unless the request asked for log probabilities.
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
    """One prompt and its `n` answers.

    - `request_id`: the place of the prompt, counted from 0, as text.
    - `prompt`: the text that the model read, after the chat template. None for prompts given as token ids.
    - `prompt_token_ids`: the tokens of the prompt.
    - `outputs`: the answers.
    - `num_cached_tokens`: tokens of the prompt that were not computed again, because another prompt began with them.
    - `error`: why there is no answer; every one of `outputs` then has finish_reason "error". None: all went well.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int
    finished: bool = True
    error: BlendServeError | None = None


def in_order(outputs: Iterable[RequestOutput]) -> list[RequestOutput]:
    """Outputs in the order of their prompts."""
    return sorted(outputs, key=lambda output: int(output.request_id))

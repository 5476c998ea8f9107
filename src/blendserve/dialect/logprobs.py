"""Log probabilities of tokens in OpenAI's two shapes: that of chat and that of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blendserve.dialect.endpoint import Codec
from blendserve.request import SamplingParams, SequenceOutput, TokenLogprob

LOWEST_LOGPROB = -9999.0
"""What OpenAI reports for minus infinity, which JSON cannot say."""


def logprobs_of_text(output: SequenceOutput, sampling: SamplingParams) -> Sequence[TokenLogprob]:
    """Those of the tokens that the answer's text holds: a final stop token is no part of it, unless that was asked."""
    is_stopped = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
    ends_in_stop_token = is_stopped and output.has_stop_token
    is_left_out = ends_in_stop_token and not sampling.include_stop_str_in_output
    return output.logprobs[:-1] if is_left_out else output.logprobs


def chat_logprobs(logprobs: Sequence[TokenLogprob], codec: Codec) -> dict[str, Any]:
    content = [
        {
            **_chat_token(entry.token_id, entry.logprob, codec),
            "top_logprobs": [_chat_token(token_id, logprob, codec) for token_id, logprob in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, codec: Codec) -> dict[str, Any]:
    data = codec.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


def completion_logprobs(logprobs: Sequence[TokenLogprob], codec: Codec) -> dict[str, Any]:
    tokens = [codec.token_bytes(entry.token_id).decode(errors="replace") for entry in logprobs]
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [_top_logprobs(entry, codec) for entry in logprobs] if any(e.top for e in logprobs) else None,
        "text_offset": offsets[:-1],
    }


def _top_logprobs(entry: TokenLogprob, codec: Codec) -> dict[str, float]:
    """The best alternatives and the sampled token, as OpenAI's completions endpoint lists them."""
    best: dict[str, float] = {}
    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
        best.setdefault(codec.token_bytes(token_id).decode(errors="replace"), _finite(logprob))
    return best


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB

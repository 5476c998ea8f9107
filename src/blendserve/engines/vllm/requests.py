"""A request of ours -> what vLLM's `add_request` takes, and back: vLLM's output -> the end of that request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from blendserve.dialect.extras import Extras
from blendserve.engines.vllm.api import VllmApi
from blendserve.errors import RequestError
from blendserve.request import FinishReason, Request, SequenceOutput, StructuredOutputs, TokenLogprob

GrammarOf = Callable[[StructuredOutputs], str]
NO_TOKENS = np.zeros(0, np.int32)


class VllmArguments(NamedTuple):
    """Arguments of `add_request` after the id."""

    prompt: Any
    params: Any
    lora_request: Any | None


def arguments_of(
    request: Request,
    extras: Extras,
    api: VllmApi,
    engine: Any,
    adapters: Mapping[str, Any],
    *,
    embeds: bool,
    grammar_of: GrammarOf | None = None,
    is_streamed: bool = False,
) -> VllmArguments:
    """Translate a request. `grammar_of` makes grammars for llguidance; None: vLLM uses something else. `is_streamed`:
    vLLM is to tell its tokens after every step. Raises: RequestError where vLLM cannot make a prompt of its messages,
    or ValueError where it refuses a parameter.
    """
    lora = adapters[extras.adapter] if extras.adapter is not None else None
    if embeds:
        prompt = api.tokens_prompt(request.prompt_token_ids.tolist())
        return VllmArguments(prompt, api.embedding_params(extras.dimensions), lora)
    if not extras.messages:
        prompt = api.tokens_prompt(request.prompt_token_ids.tolist())
        limit: int | None = request.max_output_tokens
    else:
        prompt = _chat_prompt(extras, api, engine)
        limit = request.sampling.max_tokens  # how long the prompt is, only vLLM knows: the limit stays the user's
    return VllmArguments(prompt, _sampling_params(request, api, limit, grammar_of, is_streamed=is_streamed), lora)


def _chat_prompt(extras: Extras, api: VllmApi, engine: Any) -> Any:
    try:
        return api.chat_prompt(engine, extras.messages, extras.template)
    except Exception as error:  # fetching and decoding pictures fails in every way there is
        raise RequestError(
            f"the messages cannot be turned into a prompt: {error}", code="invalid_value", param="messages"
        ) from error


def _sampling_params(
    request: Request, api: VllmApi, max_tokens: int | None, grammar_of: GrammarOf | None, *, is_streamed: bool
) -> Any:
    """Only a seed that the user gave is passed on: vLLM samples seeded requests one by one."""
    sampling = request.sampling
    return api.sampling_params(
        _structure(sampling.structured_outputs, grammar_of),
        is_streamed=is_streamed,
        max_tokens=max_tokens if max_tokens != 0 else 1,  # vLLM writes one token at least, which is then dropped
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=None if sampling.seed is None else request.seed,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        logit_bias=dict(sampling.logit_bias) or None,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        allowed_token_ids=None if sampling.allowed_token_ids is None else list(sampling.allowed_token_ids),
        bad_words=list(sampling.bad_words) or None,
        detokenize=bool(sampling.stop),  # the text is made here
        skip_special_tokens=sampling.skip_special_tokens,
        include_stop_str_in_output=sampling.include_stop_str_in_output,
    )


def _structure(asked: StructuredOutputs | None, grammar_of: GrammarOf | None) -> dict[str, Any] | None:
    """Fields of vLLM's StructuredOutputsParams. Raises: RequestError for what it cannot express."""
    if asked is None:
        return None
    if grammar_of is not None:
        return {"grammar": grammar_of(asked)}
    if asked.after:
        raise RequestError(
            f"vLLM cannot begin a grammar after {asked.after!r} with this structured_outputs_config; leave that out",
            code="unsupported_parameter",
            param="structured_outputs",
        )
    if asked.choice:
        return {"choice": list(asked.choice)}
    if asked.json_object:
        return {"json_object": True}
    if asked.json is not None:
        return {"json": json.loads(asked.json)}
    return {"regex": asked.regex} if asked.regex is not None else {"grammar": asked.grammar or asked.lark}


def was_aborted(output: Any) -> bool:
    """Did vLLM end this request without an end of its own?"""
    return not hasattr(output.outputs, "data") and any(choice.finish_reason == "abort" for choice in output.outputs)


def output_of(index: int, output: Any, request: Request) -> SequenceOutput:
    """The end of row `index`, from vLLM's `RequestOutput` or `PoolingRequestOutput`."""
    num_prompt_tokens, num_cached_tokens = len(output.prompt_token_ids or ()), output.num_cached_tokens or 0
    if hasattr(output.outputs, "data"):
        vector = np.asarray(output.outputs.data, dtype=np.float32)
        if not np.isfinite(vector).all():
            message = "the embedding holds infinities or NaNs; try --vllm-arg dtype=float32"
            return failed_output(index, RequestError(message, code="engine_error", status_code=500))
        return SequenceOutput(
            index=index,
            token_ids=NO_TOKENS,
            finish_reason="stop",
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=num_cached_tokens,
            embedding=vector,
        )
    (choice,) = output.outputs
    if choice.finish_reason not in ("stop", "length"):
        message = f"vLLM ended the request with {choice.finish_reason!r}; its log says why"
        return failed_output(index, RequestError(message, code="engine_error", status_code=500))
    reason: FinishReason = choice.finish_reason
    writes = request.max_output_tokens > 0
    return SequenceOutput(
        index=index,
        token_ids=np.array(choice.token_ids if writes else (), np.int32),
        finish_reason=reason if writes else "length",
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        logprobs=_logprobs(choice.token_ids, choice.logprobs, request.sampling.logprobs or 0) if writes else (),
        stop_reason=choice.stop_reason if writes else None,
        prompt_logprobs=_prompt_logprobs(output, request),
    )


def failed_output(index: int, error: Exception) -> SequenceOutput:
    """The end of a request that has no answer."""
    return SequenceOutput(
        index=index, token_ids=NO_TOKENS, finish_reason="error", num_prompt_tokens=0, num_cached_tokens=0, error=error
    )


def _logprobs(
    token_ids: Sequence[int], positions: Sequence[Mapping[int, Any]] | None, num_best: int
) -> tuple[TokenLogprob, ...]:
    """vLLM lists the best and, beside them, the sampled token; `top` holds the `num_best` best, best first."""
    if positions is None:
        return ()
    return tuple(
        TokenLogprob(int(token_id), float(of_token[token_id].logprob), _best(of_token, num_best))
        for token_id, of_token in zip(token_ids, positions, strict=True)
    )


def _prompt_logprobs(output: Any, request: Request) -> tuple[TokenLogprob | None, ...] | None:
    """vLLM has nothing for the first token, and the token itself beside the best."""
    num_best = request.sampling.prompt_logprobs
    if num_best is None or not output.prompt_logprobs:
        return None
    scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return (
        None,
        *(TokenLogprob(int(token), float(found[token].logprob), _best(found, num_best)) for token, found in scored),
    )


def _best(of_token: Mapping[int, Any], num_best: int) -> tuple[tuple[int, float], ...]:
    best = sorted(
        (entry.rank, token_id, entry.logprob) for token_id, entry in of_token.items() if entry.rank <= num_best
    )
    return tuple((int(token_id), float(logprob)) for _, token_id, logprob in best)

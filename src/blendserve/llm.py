"""`LLM`: a model, its engine and its tokenizer in one object, in the shape of vLLM's offline API.

Batch files add a journal around the same engine (`job`); everything else between a prompt and its answer is here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from blendserve.config import EngineConfig, cache_dir
from blendserve.detokenize import text_of
from blendserve.engine.stats import RunStats
from blendserve.errors import BlendServeError, ConfigError, RequestError
from blendserve.models.hub import resolve
from blendserve.models.load import load_model
from blendserve.outputs import CompletionOutput, RequestOutput
from blendserve.planner.policies import POLICY_NAMES
from blendserve.planner.sorting import flatten
from blendserve.planner.table import request_table
from blendserve.request import Request, SamplingParams, SequenceOutput, TokenIds
from blendserve.session import cost_of, open_engine, plan_requests, resolve_limits, run_planned

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """Load a model once, then answer lists of prompts.

    `model` is a directory with `config.json` and safetensors, a GGUF file, a hub id, or None for the default model.
    `policy` orders the requests (`planner.policies.POLICY_NAMES`). Limits of 0 mean: decide from the machine and the
    model. Answers do not depend on policy, limits or threads; they do depend on `isa` and, where a request with
    temperature > 0 gives no seed, on `seed` and the request's place in the list.
    Raises: ConfigError when the model or a limit cannot work.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        policy: str = "blend",
        kv_memory_bytes: int = 0,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int = 0,
        num_threads: int = 0,
        enable_prefix_caching: bool = True,
        isa: str = "auto",
        seed: int = 0,
    ) -> None:
        if policy not in POLICY_NAMES:
            raise ConfigError(f"unknown policy {policy!r}; known: {', '.join(POLICY_NAMES)}")
        config = EngineConfig(
            kv_memory_bytes=kv_memory_bytes,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            num_threads=num_threads,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.model = load_model(resolve(model, cache_dir()))
        self.config = resolve_limits(config, self.model.spec)
        self.policy = policy
        self.seed = seed
        self._cost = cost_of(self.model.spec, self.config.num_threads)
        self._engine = open_engine(self.model, self.config, isa=isa)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts, each a text or its token ids; the outputs are in the order of the prompts.

        `sampling_params` is one for all, one per prompt, or None for `SamplingParams()`. A prompt that cannot be served
        (too long, for example) comes back with `error` set; the others are served.
        Raises: ConfigError when the numbers of prompts and parameters differ.
        """
        listed = _listed_prompts(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in listed]
        encoded = iter(self.model.tokenizer.encode_batch([text for text in texts if text is not None]))
        token_ids = [
            np.asarray(next(encoded) if text is not None else prompt, dtype=np.int32)
            for prompt, text in zip(listed, texts, strict=True)
        ]
        return self._answer(texts, token_ids, _listed_params(sampling_params, len(listed)))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, formatted by the model's chat template; one conversation or a list of them.

        Raises: ConfigError when the model has no chat template.
        """
        conversations = _listed_conversations(messages)
        tokenizer = self.model.tokenizer
        texts = [tokenizer.apply_chat_template(conversation) for conversation in conversations]
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        token_ids = [np.asarray(ids, dtype=np.int32) for ids in encoded]
        return self._answer(list(texts), token_ids, _listed_params(sampling_params, len(texts)))

    @property
    def stats(self) -> RunStats:
        """What the latest run did, and where its time went."""
        return self._engine.stats

    def close(self) -> None:
        """Stop the threads and give the memory back."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _answer(
        self, texts: Sequence[str | None], token_ids: Sequence[TokenIds], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput | None] = [None] * len(token_ids)
        requests: list[Request] = []
        first_index: dict[int, int] = {}
        for number, (ids, sampling) in enumerate(zip(token_ids, params, strict=True)):
            try:
                limit = self._max_output_tokens(ids, sampling)
            except RequestError as error:
                outputs[number] = _failed(str(number), texts[number], ids, sampling.n, error)
                continue
            first_index[number] = len(requests)
            for choice in range(sampling.n):
                seed = _seed(self.seed, number, choice) if sampling.seed is None else sampling.seed + choice
                requests.append(Request(len(requests), ids, len(ids), sampling, limit, seed))
        results = self._run(requests)
        for number, first in first_index.items():
            choices = results[first : first + params[number].n]
            outputs[number] = self._assemble(str(number), texts[number], token_ids[number], params[number], choices)
        return [output for output in outputs if output is not None]

    def _max_output_tokens(self, token_ids: TokenIds, sampling: SamplingParams) -> int:
        """What the request asks for, within the context. Raises: RequestError when the prompt cannot be served."""
        vocab_size = self.model.spec.vocab_size
        if len(token_ids) and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
            raise RequestError(
                f"the prompt holds token ids from {token_ids.min()} to {token_ids.max()}; the model has 0 to "
                f"{vocab_size - 1}",
                code="invalid_token_id",
                param="prompt",
            )
        room = max(1, self.config.max_model_len - len(token_ids))  # the engine refuses prompts that leave none
        return room if sampling.max_tokens is None else min(room, sampling.max_tokens)

    def _run(self, requests: list[Request]) -> list[SequenceOutput]:
        if not requests:
            return []
        table = request_table(
            (request.num_prompt_tokens for request in requests),
            ((request.sampling, request.max_output_tokens) for request in requests),
        )
        prompts = flatten(request.prompt_token_ids for request in requests)
        plan = plan_requests(prompts, table, self._cost, seed=self.seed)
        results: list[SequenceOutput | None] = [None] * len(requests)
        for output in run_planned(self._engine, requests, plan, self.policy):
            results[output.index] = output
        return [result for result in results if result is not None]

    def _assemble(
        self,
        request_id: str,
        text: str | None,
        token_ids: TokenIds,
        sampling: SamplingParams,
        results: Sequence[SequenceOutput],
    ) -> RequestOutput:
        error = next((result.error for result in results if result.error is not None), None)
        if error is not None:
            assert isinstance(error, BlendServeError)
            return _failed(request_id, text, token_ids, sampling.n, error)
        return RequestOutput(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids.tolist(),
            outputs=tuple(self._completion(choice, sampling, result) for choice, result in enumerate(results)),
            num_cached_tokens=results[0].num_cached_tokens,
        )

    def _completion(self, choice: int, sampling: SamplingParams, result: SequenceOutput) -> CompletionOutput:
        has_logprobs = sampling.logprobs is not None
        return CompletionOutput(
            index=choice,
            text=text_of(self.model.tokenizer, result.token_ids, result.finish_reason, result.stop_reason),
            token_ids=tuple(result.token_ids.tolist()),
            finish_reason=result.finish_reason,
            stop_reason=result.stop_reason,
            cumulative_logprob=sum(token.logprob for token in result.logprobs) if has_logprobs else None,
            logprobs=result.logprobs if has_logprobs else None,
        )


def _listed_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and all(isinstance(prompt, int | np.integer) for prompt in prompts):
        return [prompts]  # type: ignore[list-item]  # one prompt, given as its token ids
    return list(prompts)  # type: ignore[arg-type]


def _listed_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ConfigError(f"{len(params)} sampling parameters for {count} prompts; give one for all or one per prompt")
    return list(params)


def _listed_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    if len(messages) and isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    return list(messages)  # type: ignore[arg-type]


def _seed(base: int, number: int, choice: int) -> int:
    """A seed for a request that gave none: fixed by its place, so that a rerun repeats it."""
    digest = hashlib.blake2b(f"{base}:{number}:{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _failed(
    request_id: str, text: str | None, token_ids: TokenIds, num_choices: int, error: BlendServeError
) -> RequestOutput:
    choice_texts: Iterable[int] = range(num_choices)
    return RequestOutput(
        request_id=request_id,
        prompt=text,
        prompt_token_ids=token_ids.tolist(),
        outputs=tuple(CompletionOutput(choice, "", (), "error") for choice in choice_texts),
        num_cached_tokens=0,
        error=error,
    )

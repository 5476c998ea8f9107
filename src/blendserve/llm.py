"""`LLM`: a model, its engine and its tokenizer in one object, in the shape of vLLM's offline API.

Batch files add a journal around the same engine (`job`); everything else between a prompt and its answer is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from blendserve.batchfile.parameters import MAX_CHOICES, check_params, shown
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
from blendserve.seeds import choice_seed, derived_seed
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
        notes: list[str] = []
        self._cost = cost_of(self.model.spec, self.config.num_threads, notes.append)
        self.notes = tuple(notes)
        """Sentences that the user should read, such as why a calibration was not used."""
        self._engine = open_engine(self.model, self.config, isa=isa)
        self._is_closed = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts, each a text or its token ids; the outputs are in the order of the prompts.

        `sampling_params` is one for all, one per prompt, or None for `SamplingParams()`. A prompt that cannot be served
        (too long, or a parameter out of range) comes back with `error` set; the others are served.
        Raises: ConfigError when the numbers of prompts and parameters differ, or after `close`.
        """
        listed = _listed_prompts(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in listed]
        encoded = iter(self.model.tokenizer.encode_batch([text for text in texts if text is not None]))
        vocab_size = self.model.spec.vocab_size
        prompt_ids = [
            next(encoded) if text is not None else _token_ids(prompt, vocab_size)
            for prompt, text in zip(listed, texts, strict=True)
        ]
        return self._answer(texts, prompt_ids, _listed_params(sampling_params, len(listed)))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, formatted by the model's chat template; one conversation or a list of them.

        A conversation that the template does not take comes back with `error` set; the others are served.
        Raises: ConfigError when the model has no chat template, or after `close`.
        """
        conversations = _listed_conversations(messages)
        rendered = [self._render(conversation) for conversation in conversations]
        texts = [text if isinstance(text, str) else None for text in rendered]
        given = [text for text in texts if text is not None]
        encoded = iter(self.model.tokenizer.encode_batch(given, add_special_tokens=False))
        prompt_ids = [next(encoded) if isinstance(text, str) else text for text in rendered]
        return self._answer(texts, prompt_ids, _listed_params(sampling_params, len(texts)))

    @property
    def stats(self) -> RunStats:
        """What the latest run did, and where its time went."""
        return self._engine.stats

    def close(self) -> None:
        """Stop the threads and give the memory back. Closing again does nothing; prompts are refused from now on."""
        self._is_closed = True
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _render(self, conversation: Sequence[Message]) -> str | RequestError:
        try:
            return self.model.tokenizer.apply_chat_template(conversation)
        except RequestError as error:
            return error

    def _answer(
        self,
        texts: Sequence[str | None],
        prompt_ids: Sequence[TokenIds | RequestError],
        params: Sequence[SamplingParams],
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput | None] = [None] * len(prompt_ids)
        requests: list[Request] = []
        first_by_number: dict[int, int] = {}
        checked = {id(sampling): self._checked(sampling) for sampling in params}
        for number, (token_ids, given) in enumerate(zip(prompt_ids, params, strict=True)):
            sampling = checked[id(given)]
            if isinstance(token_ids, RequestError):
                outputs[number] = _failed(str(number), texts[number], (), given, token_ids)
            elif isinstance(sampling, RequestError):
                outputs[number] = _failed(str(number), texts[number], token_ids.tolist(), given, sampling)
            else:
                first_by_number[number] = len(requests)
                requests += self._requests(number, len(requests), token_ids, sampling)
        results = self._run(requests)
        for number, first in first_by_number.items():
            choices = results[first : first + params[number].n]
            token_ids = requests[first].prompt_token_ids
            outputs[number] = self._assemble(str(number), texts[number], token_ids, params[number], choices)
        return [output for output in outputs if output is not None]

    def _checked(self, sampling: SamplingParams) -> SamplingParams | RequestError:
        try:
            return check_params(sampling, self.model.spec.vocab_size)
        except RequestError as error:
            return error

    def _requests(self, number: int, first: int, token_ids: TokenIds, sampling: SamplingParams) -> list[Request]:
        """One request per choice of prompt `number`, numbered from `first`."""
        room = max(1, self.config.max_model_len - len(token_ids))  # the engine refuses prompts that leave none
        limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        seeds = [
            derived_seed(b"place", f"{self.seed}:{number}".encode(), choice)
            if sampling.seed is None
            else choice_seed(sampling.seed, choice)
            for choice in range(sampling.n)
        ]
        return [
            Request(first + choice, token_ids, len(token_ids), sampling, limit, seed)
            for choice, seed in enumerate(seeds)
        ]

    def _run(self, requests: list[Request]) -> list[SequenceOutput]:
        if self._is_closed:
            raise ConfigError("this LLM is closed; make a new one")
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
            return _failed(request_id, text, token_ids.tolist(), sampling, error)
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


def _token_ids(prompt: Prompt, vocab_size: int) -> TokenIds | RequestError:
    """A prompt given as token ids; an error where it is anything else."""
    try:
        token_ids = np.asarray(prompt)
    except ValueError:  # lists of different lengths
        token_ids = np.zeros((0, 0))
    if token_ids.ndim != 1 or (token_ids.size and token_ids.dtype.kind not in "iu"):
        return RequestError(
            f"the prompt is {shown(prompt)}; it must be a text or a list of token ids",
            code="invalid_type",
            param="prompt",
        )
    if token_ids.size and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
        return RequestError(
            f"the prompt holds token ids from {token_ids.min()} to {token_ids.max()}; the model has 0 to "
            f"{vocab_size - 1}",
            code="invalid_token_id",
            param="prompt",
        )
    return token_ids.astype(np.int32)


def _failed(
    request_id: str,
    text: str | None,
    token_ids: Sequence[int],
    sampling: SamplingParams,
    error: BlendServeError,
) -> RequestOutput:
    num_choices = sampling.n if sampling.n in range(1, MAX_CHOICES + 1) else 1
    return RequestOutput(
        request_id=request_id,
        prompt=text,
        prompt_token_ids=token_ids,
        outputs=tuple(CompletionOutput(choice, "", (), "error") for choice in range(num_choices)),
        num_cached_tokens=0,
        error=error,
    )

"""From prompts to engine requests and back to `RequestOutput`s, for prompts that are numbered as they come.

Holds what is unfinished and nothing else, so that a stream of prompts may be endless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from blendserve.config import BLOCK_SIZE
from blendserve.dialect.parameters import check_params
from blendserve.dialect.readers import MAX_CHOICES
from blendserve.dialect.structured import check_structure
from blendserve.engine.keys import block_keys
from blendserve.errors import BlendServeError, ExecutorError, RequestError
from blendserve.models.detokenize import text_of
from blendserve.models.tokenizer import Tokenizer
from blendserve.offline.outputs import CompletionOutput, RequestOutput
from blendserve.planner.base import RequestTable
from blendserve.planner.table import request_table
from blendserve.request import EmbeddingParams, Request, SamplingParams, SequenceOutput, TokenIds
from blendserve.seeds import choice_seed, derived_seed


@dataclass(slots=True)
class _Unfinished:
    """A prompt whose choices run; requests [first, first + n) are its choices."""

    number: int
    text: str | None
    token_ids: TokenIds
    sampling: SamplingParams
    first: int
    results: dict[int, SequenceOutput] = field(default_factory=dict)


class OutputAssembler:
    """The requests of all prompts added so far, dense from 0: a `RequestSource` of those that are unfinished.

    `take` gives the outputs that became whole since it was last called. Seeds that a prompt does not give follow from
    `seed` and the prompt's number. With `embedding` every request is for a vector: `vectors` has them by the prompt's
    number.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        max_model_len: int,
        seed: int,
        embedding: EmbeddingParams | None = None,
    ) -> None:
        self.vectors: dict[int, NDArray[np.float32]] = {}
        self._embedding = embedding
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._seed = seed
        self._num_prompts = self._num_requests = 0
        self._requests: dict[int, Request] = {}
        self._prompts: dict[int, _Unfinished] = {}
        self._whole: list[RequestOutput] = []
        self._checked: tuple[SamplingParams | None, SamplingParams | RequestError | None] = (None, None)

    def __len__(self) -> int:
        return self._num_requests

    def __getitem__(self, index: int, /) -> Request:
        return self._requests[index]

    @property
    def num_unfinished(self) -> int:
        """Requests added and not applied yet."""
        return len(self._requests)

    def add(self, text: str | None, token_ids: TokenIds | RequestError, given: SamplingParams) -> list[Request]:
        """Take in the next prompt. Returns: its requests, one per choice; none where it is an output (an error) at
        once."""
        number = self._num_prompts
        self._num_prompts += 1
        if isinstance(token_ids, RequestError):
            self._whole.append(_failed(number, text, (), given, token_ids))
            return []
        sampling = self._check(given)
        if isinstance(sampling, RequestError):
            self._whole.append(_failed(number, text, token_ids.tolist(), given, sampling))
            return []
        requests = self._requests_of(number, token_ids, sampling)
        prompt = _Unfinished(number, text, token_ids, sampling, self._num_requests)
        self._num_requests += len(requests)
        for request in requests:
            self._requests[request.index] = request
            self._prompts[request.index] = prompt
        return requests

    def apply(self, output: SequenceOutput) -> None:
        """Take the end of one request. Raises: ExecutorError when it had ended before."""
        prompt = self._prompts.pop(output.index, None)
        if prompt is None:
            raise ExecutorError(f"the engine ended request {output.index} twice; this is a bug, please report it")
        del self._requests[output.index]
        prompt.results[output.index - prompt.first] = output
        if len(prompt.results) == prompt.sampling.n:
            self._whole.append(self._assemble(prompt))

    def take(self) -> list[RequestOutput]:
        """The outputs that are whole since the last call. Mutates: they are given away."""
        whole, self._whole = self._whole, []
        return whole

    def _check(self, given: SamplingParams) -> SamplingParams | RequestError:
        before, checked = self._checked
        if before is not given or checked is None:
            try:
                checked = check_params(given, self._vocab_size)
                if given.structured_outputs is not None:
                    structure = check_structure("structured_outputs", given.structured_outputs)
                    checked = replace(checked, structured_outputs=structure)
            except RequestError as error:
                checked = error
            self._checked = (given, checked)
        return checked

    def _requests_of(self, number: int, token_ids: TokenIds, sampling: SamplingParams) -> list[Request]:
        room = max(1, self._max_model_len - len(token_ids))  # the engine refuses prompts that leave none
        limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        keys = block_keys(token_ids, BLOCK_SIZE)
        seeds = [
            derived_seed(b"place", f"{self._seed}:{number}".encode(), choice)
            if sampling.seed is None
            else choice_seed(sampling.seed, choice)
            for choice in range(sampling.n)
        ]
        return [
            Request(
                self._num_requests + choice, token_ids, len(token_ids), sampling, limit, seed, keys, self._embedding
            )
            for choice, seed in enumerate(seeds)
        ]

    def _assemble(self, prompt: _Unfinished) -> RequestOutput:
        results = [prompt.results[choice] for choice in range(prompt.sampling.n)]
        error = next((result.error for result in results if result.error is not None), None)
        if error is not None:
            assert isinstance(error, BlendServeError)
            return _failed(prompt.number, prompt.text, prompt.token_ids.tolist(), prompt.sampling, error)
        if results[0].embedding is not None:
            self.vectors[prompt.number] = results[0].embedding
        return RequestOutput(
            request_id=str(prompt.number),
            prompt=prompt.text,
            prompt_token_ids=prompt.token_ids.tolist(),
            outputs=tuple(self._completion(choice, prompt.sampling, result) for choice, result in enumerate(results)),
            num_cached_tokens=results[0].num_cached_tokens,
            prompt_logprobs=results[0].prompt_logprobs,
        )

    def _completion(self, choice: int, sampling: SamplingParams, result: SequenceOutput) -> CompletionOutput:
        has_logprobs = sampling.logprobs is not None
        return CompletionOutput(
            index=choice,
            text=text_of(
                self._tokenizer,
                result.token_ids,
                result.finish_reason,
                result.stop_reason,
                sampling,
                has_stop_token=result.has_stop_token,
            ),
            token_ids=tuple(result.token_ids.tolist()),
            finish_reason=result.finish_reason,
            stop_reason=result.stop_reason,
            cumulative_logprob=sum(token.logprob for token in result.logprobs) if has_logprobs else None,
            logprobs=result.logprobs if has_logprobs else None,
        )


def _failed(
    number: int, text: str | None, token_ids: Sequence[int], sampling: SamplingParams, error: BlendServeError
) -> RequestOutput:
    num_choices = sampling.n if sampling.n in range(1, MAX_CHOICES + 1) else 1
    return RequestOutput(
        request_id=str(number),
        prompt=text,
        prompt_token_ids=token_ids,
        outputs=tuple(CompletionOutput(choice, "", (), "error") for choice in range(num_choices)),
        num_cached_tokens=0,
        error=error,
    )


def table_of(requests: Sequence[Request]) -> RequestTable:
    """What a planner needs to know of requests, in their order."""
    return request_table(
        (request.num_prompt_tokens for request in requests),
        ((request.sampling, request.max_output_tokens) for request in requests),
    )

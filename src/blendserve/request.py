"""What a user asks for and what comes back: immutable values that every other module shares.

User input is checked where it enters (`dialect`, `offline`); these types only hold it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
FinishReason = Literal["stop", "length", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """What an answer must look like: exactly one of the first six. Names are those of vLLM's offline API, but `lark`.

    - `json`: a JSON schema as text (`dialect.structured.checked` also takes an object).
    - `json_object`: some JSON object.
    - `regex`: a regular expression for the whole answer.
    - `choice`: one of these texts.
    - `grammar`: a context-free grammar, in Lark's or GBNF's notation; which one is seen from the text.
    - `lark`: a grammar in llguidance's own dialect of Lark, taken as it is.
    - `after`: the grammar begins behind the first occurrence of this text. What is before it is free, and so is an
      answer in which it never occurs (default: empty, the grammar holds from the first token on).
    - `begin`: with `after`, something may stand before the grammar only in an answer that begins with this text, such
      as `<think>` (default: empty).
    """

    json: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None
    lark: str | None = None
    after: str = ""
    begin: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names and defaults are those of vLLM's offline API.

    - `max_tokens`: the answer ends after so many tokens (default: 16). None: as many as the model's context leaves.
    - `min_tokens`: the answer has at least so many tokens, and no end of text among them (default: 0).
    - `temperature`: 0 takes the most likely token; higher values take less likely ones more often (default: 1). Between
      0 and 0.01 it counts as 0.01.
    - `top_p`, `top_k`, `min_p`: sample among the most likely tokens only; 1, 0 and 0, the defaults, allow all.
    - `seed`: None, the default, derives a seed from the request, so that a rerun gives the same tokens.
    - `stop`, `stop_token_ids`: texts and tokens that end the answer (default: none).
    - `ignore_eos`: go on after the model's own end of text (default: false).
    - `n`: answers per prompt (default: 1).
    - `logprobs`: None, the default, gives no log probabilities; 0 gives those of the sampled tokens; k also gives the k
      best alternatives of each.
    - `prompt_logprobs`: None, the default, gives none; 0 gives the log probability of every token of the prompt but the
      first; k also gives the k best alternatives of each. `max_tokens` of 0 then reads the prompt and writes nothing.
    - `logit_bias`: numbers by token id, added to the logits; beyond -100 and 100 they count as those (default: none).
    - `presence_penalty`, `frequency_penalty` (from -2 to 2, default 0), `repetition_penalty` (above 0, default 1): make
      tokens that have occurred less likely.
    - `allowed_token_ids`: only these tokens are sampled. None, the default, allows all.
    - `bad_words`: texts that are not generated: the last token of one is banned where it would complete it (default:
      none).
    - `include_stop_str_in_output`: the text keeps the stop string or the stop token that ended it (default: false).
    - `skip_special_tokens`: leave the model's special tokens out of the text (default: true).
    - `spaces_between_special_tokens`: accepted for vLLM's sake: the tokenizers here put no spaces between such tokens.
    - `truncate_prompt_tokens`: keep only so many tokens of the prompt, its last ones; -1: as many as the context holds
      beside one token of answer. None, the default, keeps all.
    - `detokenize`: false gives token ids and no text (default: true).
    - `structured_outputs`: what the answer must look like (default: free text).
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    detokenize: bool = True
    structured_outputs: StructuredOutputs | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingParams:
    """That a request wants one vector instead of tokens, and of how many dimensions: None means all of the model's."""

    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. A user's request with `n` choices becomes `n` of these.

    `index` is the row of the job (dense from 0); `max_output_tokens` is `sampling.max_tokens` already capped by
    the context; `seed` is resolved. `block_keys[j]` identifies the content of prompt tokens
    [0, (j + 1) * block_size): equal keys, equal content. Only full blocks have keys. A request with `embedding` has no
    output tokens.
    """

    index: int
    prompt_token_ids: TokenIds
    num_prompt_tokens: int
    sampling: SamplingParams
    max_output_tokens: int
    seed: int = 0
    block_keys: Sequence[Hashable] = ()
    embedding: EmbeddingParams | None = None


class RequestSource(Protocol):
    """Random access to the requests of a job by index; may build them on demand from mapped files."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Request: ...


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of one token, with the best alternatives as (token id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ServerResponse:
    """What a remote server answered to a whole line: its status and JSON body, kept as they came. The body is mostly an
    object.

    `request_id` is the server's own, where it gave one. Units: tokens, as the server counts them.
    """

    status_code: int
    body: Any
    request_id: str | None = None
    num_output_tokens: int = 0

    @property
    def is_success(self) -> bool:
        return 200 <= self.status_code < 300


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What the engine yields when the sequence of `Request.index` has ended.

    `error` is set exactly when `finish_reason == "error"`. Token ids include a final stop token, if one was sampled;
    `has_stop_token` is false where a complete grammar ended the sequence without one. There are none where a remote
    server gave the `response`. `embedding` is the vector of a request for one. `prompt_logprobs` has an entry for every
    token of the prompt where they were asked for; the first has none.
    """

    index: int
    token_ids: TokenIds
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    stop_reason: int | str | None = None
    error: Exception | None = None
    response: ServerResponse | None = None
    embedding: NDArray[np.float32] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    has_stop_token: bool = True

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) if self.response is None else self.response.num_output_tokens

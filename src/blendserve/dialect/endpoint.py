"""What one endpoint of OpenAI's API is to a batch line: how its body is read, and how an answer to it is written.

Every endpoint is one module (`chat`, `completions`, `embeddings`); `endpoints` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from blendserve.dialect.extras import NO_EXTRAS, Abilities, Extras
from blendserve.dialect.prompts import Prompt
from blendserve.errors import RequestError
from blendserve.models.chat_formats import NO_PARTS, AnswerParts
from blendserve.models.conversation import Conversation
from blendserve.models.tool_formats.format import Tool
from blendserve.request import SamplingParams, SequenceOutput, StructuredOutputs, TokenIds

EncodedPrompt = Sequence[int] | TokenIds
_PLAIN = SamplingParams()


class Codec(Protocol):
    """Text to tokens and back: the tokenizer and chat template of the served model.

    `encode` takes texts and conversations in batches and returns, in their order, token ids or why there are none; it
    raises RequestError where it does not know whose fault it is (the batch is then taken apart to find out). `text_of`
    is the answer as its parameters want it, mostly without its stop token or stop string; `parts_of` is the same taken
    apart: reasoning, calls of `tools` (where the answer may hold any) and content, with the number of tokens that the
    reasoning took.
    `use_date` sets what chat templates get as today. `settled` is what a chat's answer must look like, given what its
    prompt came to.
    """

    def encode(self, prompts: Sequence[str | Conversation]) -> Sequence[EncodedPrompt | RequestError]: ...
    def parts_of(
        self,
        prompt_token_ids: EncodedPrompt,
        output: SequenceOutput,
        sampling: SamplingParams,
        tools: Sequence[Tool],
        *,
        may_call: bool,
    ) -> tuple[AnswerParts, int]: ...
    def use_date(self, date: str) -> None: ...
    def settled(self, structure: StructuredOutputs, prompt_token_ids: EncodedPrompt) -> StructuredOutputs: ...
    def text_of(self, output: SequenceOutput, sampling: SamplingParams) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class ReadBody:
    """What a body asks for. Each of `prompts` has `sampling.n` answers."""

    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    extras: Extras = NO_EXTRAS


@dataclass(frozen=True, slots=True)
class StoredLine:
    """One line as answering it needs it. Its requests are [first_request, first_request + num_choices)."""

    line_number: int
    custom_id: str
    url: str
    num_prompts: int
    n: int
    first_request: int

    @property
    def num_choices(self) -> int:
        return self.num_prompts * self.n


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer of a line, about to be written. `choice` numbers it as OpenAI does: prompt i has [i * n, (i + 1) * n).
    `prompt_token_ids` is what the model read, `key` is unique to the line. `parts` are filled in for endpoints that
    have parts. Units: tokens.
    """

    line: StoredLine
    key: str
    choice: int
    prompt_token_ids: EncodedPrompt
    output: SequenceOutput
    extras: Extras
    codec: Codec
    sampling: SamplingParams = _PLAIN
    parts: AnswerParts = NO_PARTS
    num_reasoning_tokens: int = 0

    @property
    def text(self) -> str:
        return self.codec.text_of(self.output, self.sampling)


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    """One choice as the response holds it, with what the line's usage adds up. Units: tokens."""

    body: Mapping[str, Any]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AnsweredLine:
    """A line with all of its choices, in order. `key` is unique to the line, `created` the job's own time."""

    line: StoredLine
    key: str
    model: str
    created: int
    extras: Extras
    choices: Sequence[FinishedChoice]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`prompt_field` is where a body holds what the model reads. `read` raises RequestError for a body that cannot be
    answered, naming the parameter. `choice_body` and `body` return JSON values. `has_parts`: its answers may hold
    reasoning and calls.
    """

    url: str
    prompt_field: str
    read: Callable[[Mapping[str, Any], Abilities], ReadBody]
    choice_body: Callable[[Choice], dict[str, Any]]
    body: Callable[[AnsweredLine], dict[str, Any]]
    has_parts: bool = False


def text_usage(answered: AnsweredLine) -> dict[str, Any]:
    """A prompt counts once, however many choices it has; cached is what even its first choice did not compute."""
    choices, n = answered.choices, answered.line.n
    prompts = [choices[begin : begin + n] for begin in range(0, len(choices), n)]
    num_prompt = sum(of_prompt[0].num_prompt_tokens for of_prompt in prompts)
    num_output = sum(choice.num_output_tokens for choice in choices)
    num_cached = sum(min(choice.num_cached_tokens for choice in of_prompt) for of_prompt in prompts)
    num_reasoning = sum(choice.num_reasoning_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        **({"completion_tokens_details": {"reasoning_tokens": num_reasoning}} if num_reasoning else {}),
    }

"""What planning needs to know of requests that another server answers: prompts as tokens, limits, rough costs.

Without the model's tokenizer four bytes of text count as one token, and are its id: lengths are estimates then,
shared prefixes are still real.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from blendserve.costs.hardware import known_hardware, peak_cost_model
from blendserve.costs.model_cost import CostModel, ModelCost
from blendserve.dialect.codec import ModelCodec
from blendserve.dialect.endpoint import EncodedPrompt
from blendserve.dialect.values import MAX_INT32
from blendserve.errors import ExecutorError, RequestError
from blendserve.job.pending import PendingRequests
from blendserve.models.conversation import Conversation, text_of_content
from blendserve.models.known import known_model
from blendserve.models.tokenizer import Tokenizer
from blendserve.models.tool_formats.format import Tool
from blendserve.planner.base import Int64s, RequestTable
from blendserve.planner.tree import PrefixTree
from blendserve.request import SamplingParams, SequenceOutput, StructuredOutputs, TokenIds

BYTES_PER_TOKEN = 4
DEFAULT_MAX_OUTPUT_TOKENS = 4096
"""Longest output that planning expects of a request without a limit of its own."""


class EstimatingCodec:
    """A `Codec` that refuses nothing: prompts that the chat template does not take are encoded as plain text."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._codec = ModelCodec(tokenizer) if tokenizer is not None else None

    def encode(self, prompts: Sequence[str | Conversation]) -> list[TokenIds]:
        if self._codec is None:
            return [tokens_of_bytes(text_of(prompt)) for prompt in prompts]
        try:
            encoded = self._codec.encode(prompts)
        except RequestError:  # there is no template
            encoded = self._codec.encode([text_of(prompt) for prompt in prompts])
        return [
            self._encode_otherwise(self._codec, prompt) if isinstance(outcome, RequestError) else outcome
            for prompt, outcome in zip(prompts, encoded, strict=True)
        ]

    def text_of(self, output: SequenceOutput, _: SamplingParams) -> NoReturn:
        raise ExecutorError(f"request {output.index} has no response; this is a bug, please report it")

    def use_date(self, date: str) -> None:
        pass

    def settled(self, structure: StructuredOutputs, prompt_token_ids: EncodedPrompt) -> StructuredOutputs:  # noqa: ARG002
        return structure

    def parts_of(
        self,
        prompt_token_ids: EncodedPrompt,  # noqa: ARG002
        output: SequenceOutput,
        sampling: SamplingParams,
        tools: Sequence[Tool],  # noqa: ARG002
        *,
        may_call: bool,  # noqa: ARG002
    ) -> NoReturn:
        self.text_of(output, sampling)

    def token_bytes(self, token_id: int) -> NoReturn:
        raise ExecutorError(f"token {token_id} has no response; this is a bug, please report it")

    def _encode_otherwise(self, codec: ModelCodec, prompt: str | Conversation) -> TokenIds:
        (encoded,) = codec.encode([text_of(prompt)])
        return tokens_of_bytes(text_of(prompt)) if isinstance(encoded, RequestError) else encoded


def text_of(prompt: str | Conversation) -> str:
    """A prompt as plain text, roles included."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{message['role']}: {text_of_content(message['content'])}\n" for message in prompt.messages)


def tokens_of_bytes(text: str) -> TokenIds:
    """Every four bytes of a text as one number in [0, 2^31): as many as tokens are likely, equal where texts are."""
    data = text.encode()
    padded = data + b"\0" * (-len(data) % BYTES_PER_TOKEN)
    return (np.frombuffer(padded, "<u4") & 0x7FFFFFFF).astype(np.int32)


def remote_table(pending: PendingRequests) -> RequestTable:
    """What a policy may know, with a limit for requests that have none."""
    table = pending.table()
    is_limited = table.max_output_tokens < MAX_INT32
    return RequestTable(
        table.num_prompt_tokens,
        np.where(is_limited, table.max_output_tokens, DEFAULT_MAX_OUTPUT_TOKENS),
        np.where(is_limited, table.known_output_tokens, -1),
    )


def remote_cost() -> CostModel:
    """Costs on a machine that is not known: an 8B model on one A100. Only their ratio matters to an order."""
    return peak_cost_model(ModelCost.from_spec(known_model("llama-3-8b")), known_hardware("a100-80g"))


def planned_cached_tokens(tree: PrefixTree) -> Int64s:
    """Tokens of every prompt that the one before it in depth-first order also has, by full blocks where `tree` is a
    plan's; all but one of a repeated prompt. Shape: int64[num_requests]."""
    cached = np.empty(tree.num_requests, np.int64)
    is_first = np.zeros(tree.num_requests, np.bool_)
    is_first[np.cumsum(tree.leaf_count) - tree.leaf_count] = True
    lengths = np.repeat(tree.leaf_len, tree.leaf_count)
    shared = np.repeat(tree.leaf_lcp, tree.leaf_count)
    cached[tree.order] = np.where(is_first, shared, np.maximum(lengths - 1, 0))
    return cached

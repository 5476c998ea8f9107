"""A batch file -> prompts in the store, and one journal row per line that cannot be served.

Lines are encoded in batches, so that the tokenizer may use all cores; a bad line never takes its batch along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from blendserve.dialect.endpoint import Codec, EncodedPrompt
from blendserve.dialect.endpoints import ENDPOINTS
from blendserve.dialect.parameters import kept_tokens
from blendserve.dialect.prompts import Prompt
from blendserve.dialect.schema import BatchLine
from blendserve.errors import RequestError
from blendserve.job.reader import BadLine
from blendserve.models.conversation import Conversation, num_characters

MAX_BATCH_LINES = 1024
MAX_BATCH_CHARACTERS = 4 << 20
"""Bounds what is held as text at a time; both large enough to keep every core's tokenizer busy."""

TokenLists = Sequence[EncodedPrompt]


def encode_lines(
    lines: Iterable[BatchLine | BadLine],
    codec: Codec,
    max_model_len: int,
    accept: Callable[[BatchLine, TokenLists], None],
    refuse: Callable[[BadLine], None],
) -> None:
    """Hand every line to `accept` with the tokens of its prompts, or to `refuse`; both in the order of the file."""
    batch: list[BatchLine | BadLine] = []
    num_characters = 0

    def flush() -> None:
        for line, outcome in zip(batch, _encode_batch(batch, codec, max_model_len), strict=True):
            if isinstance(line, BadLine):
                refuse(line)
            elif isinstance(outcome, RequestError):
                refuse(BadLine(line.line_number, line.custom_id, outcome))
            else:
                accept(_settled(line, outcome, codec), outcome)
        batch.clear()

    for line in lines:
        batch.append(line)
        num_characters += _num_characters(line)
        if len(batch) >= MAX_BATCH_LINES or num_characters >= MAX_BATCH_CHARACTERS:
            flush()
            num_characters = 0
    flush()


def _settled(line: BatchLine, token_lists: TokenLists, codec: Codec) -> BatchLine:
    """A chat whose answer must have a shape: where its reasoning ends, only the prompt tells."""
    structure = line.sampling.structured_outputs
    if structure is None or not isinstance(line.prompts[0], Conversation):
        return line
    settled = codec.settled(structure, token_lists[0])
    return replace(line, sampling=replace(line.sampling, structured_outputs=settled))


def _encode_batch(
    lines: Sequence[BatchLine | BadLine], codec: Codec, max_model_len: int
) -> list[TokenLists | RequestError]:
    prompts = [prompt for line in lines if isinstance(line, BatchLine) for prompt in line.prompts]
    encoded = iter(_encode_texts(prompts, codec))
    outcomes: list[TokenLists | RequestError] = []
    for line in lines:
        of_line = [next(encoded) for _ in line.prompts] if isinstance(line, BatchLine) else []
        outcomes.append(_checked(line, of_line, max_model_len) if isinstance(line, BatchLine) else [])
    return outcomes


def _encode_texts(prompts: Sequence[Prompt], codec: Codec) -> list[EncodedPrompt | RequestError]:
    """Encode what is text; prompts given as token ids pass through."""
    outcomes: list[EncodedPrompt | RequestError] = [*prompts]  # type: ignore[list-item]
    positions = [position for position, prompt in enumerate(prompts) if _is_text(prompt)]
    texts = [prompts[position] for position in positions]
    for position, outcome in zip(positions, _encode_or_isolate(texts, codec), strict=True):
        outcomes[position] = outcome
    return outcomes


def _encode_or_isolate(texts: list[Prompt], codec: Codec) -> Sequence[EncodedPrompt | RequestError]:
    """One call for all; when it fails, halves, so that k bad texts of n cost about k log n calls more."""
    if not texts:
        return []
    try:
        return codec.encode(texts)  # type: ignore[arg-type]
    except RequestError as error:
        if len(texts) == 1:
            return [error]
    middle = len(texts) // 2
    return [*_encode_or_isolate(texts[:middle], codec), *_encode_or_isolate(texts[middle:], codec)]


def _checked(
    line: BatchLine, encoded: Sequence[EncodedPrompt | RequestError], max_model_len: int
) -> TokenLists | RequestError:
    param = ENDPOINTS[line.url].prompt_field if line.url in ENDPOINTS else None
    token_lists: list[EncodedPrompt] = []
    for token_ids in encoded:
        if isinstance(token_ids, RequestError):
            return RequestError(token_ids.message, code=token_ids.code, param=token_ids.param or param)
        token_ids = kept_tokens(
            token_ids, line.sampling.truncate_prompt_tokens, line.sampling.max_tokens, max_model_len
        )
        if not len(token_ids):
            return RequestError(
                f"{param or 'the prompt'} is empty: it comes to no token; write at least one word",
                code="invalid_value",
                param=param,
            )
        if max_model_len and len(token_ids) >= max_model_len:
            return RequestError(
                f"the prompt has {len(token_ids)} tokens, the context is {max_model_len}, and an answer needs at least "
                "one: shorten the prompt, or raise --max-model-len where the model allows",
                code="context_length_exceeded",
                param=param,
            )
        token_lists.append(token_ids)
    return token_lists


def _is_text(prompt: Prompt) -> bool:
    return not isinstance(prompt, tuple)


def _num_characters(line: BatchLine | BadLine) -> int:
    """All that a line holds in memory, about."""
    if isinstance(line, BadLine):
        return len(line.custom_id or "")
    sampling = line.sampling
    token_ids = len(sampling.stop_token_ids) + len(sampling.allowed_token_ids or ())
    listed = 4 * token_ids + 8 * len(sampling.logit_bias) + sum(map(len, (*sampling.stop, *sampling.bad_words)))
    return len(line.custom_id) + len(line.body) + listed + sum(map(_prompt_characters, line.prompts))


def _prompt_characters(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return 4 * len(prompt) if isinstance(prompt, tuple) else num_characters(prompt)

"""Rows of the output and the error file, in OpenAI's shapes: what the journal stores and the files hold, byte by byte.

Ids are hashes of line number and custom_id and `created` is the job's own, so that a resumed job writes the rows of an
uninterrupted one. Only `cached_tokens` tells how a run went: it depends on what else ran before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from blendserve.dialect.schema import CHAT_URL, EMBEDDINGS_URL, Message, Url
from blendserve.errors import CapacityError, RequestError
from blendserve.request import SamplingParams, SequenceOutput, ServerResponse, TokenIds, TokenLogprob

LOWEST_LOGPROB = -9999.0
"""What OpenAI reports for minus infinity, which JSON cannot say."""

_LINE_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


EncodedPrompt = Sequence[int] | TokenIds


class Codec(Protocol):
    """Text to tokens and back: the tokenizer and chat template of the served model.

    `encode` takes texts and conversations in batches and returns, in their order, token ids or why there are none; it
    raises RequestError where it does not know whose fault it is (the batch is then taken apart to find out). `text_of`
    is the answer as its parameters want it, mostly without its stop token or stop string.
    """

    def encode(self, prompts: Sequence[str | tuple[Message, ...]]) -> Sequence[EncodedPrompt | RequestError]: ...
    def text_of(self, output: SequenceOutput, sampling: SamplingParams) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class StoredLine:
    """One line as answering it needs it. Its requests are [first_request, first_request + num_choices)."""

    line_number: int
    custom_id: str
    url: Url
    num_prompts: int
    n: int
    first_request: int

    @property
    def num_choices(self) -> int:
        return self.num_prompts * self.n


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    """One choice as the response holds it, with what the line's usage adds up. Units: tokens."""

    body: Mapping[str, Any]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int

    @classmethod
    def from_output(
        cls, url: Url, choice: int, output: SequenceOutput, codec: Codec, sampling: SamplingParams
    ) -> FinishedChoice:
        return cls(
            _choice_body(url, choice, output, codec, sampling),
            output.num_prompt_tokens,
            output.num_cached_tokens,
            len(output.token_ids),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> FinishedChoice:
        return cls(*json.loads(data))

    def to_bytes(self) -> bytes:
        return _to_json([self.body, self.num_prompt_tokens, self.num_cached_tokens, self.num_output_tokens])


def output_row(line: StoredLine, choices: Sequence[FinishedChoice], model: str, created: int) -> bytes:
    """The row of an answered line. `choices` holds all of the line's, in order."""
    key = _key(line.line_number, line.custom_id)
    body = _embeddings_body(choices, model) if line.url == EMBEDDINGS_URL else _text_body(line, choices, model, created)
    return _row(key, line.custom_id, {"status_code": 200, "request_id": f"req_{key}", "body": body}, None)


def _text_body(line: StoredLine, choices: Sequence[FinishedChoice], model: str, created: int) -> dict[str, Any]:
    key = _key(line.line_number, line.custom_id)
    is_chat = line.url == CHAT_URL
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{key}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [choice.body for choice in choices],
        "usage": _usage(line, choices),
        "system_fingerprint": None,
    }


def _embeddings_body(choices: Sequence[FinishedChoice], model: str) -> dict[str, Any]:
    num_tokens = sum(choice.num_prompt_tokens for choice in choices)
    return {
        "object": "list",
        "data": [choice.body for choice in choices],
        "model": model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def error_row(line_number: int, custom_id: str | None, error: Exception) -> bytes:
    """The row of a line that failed: as an HTTP response where a server would have sent one, else as a plain error."""
    key = _key(line_number, custom_id)
    message = f"line {line_number}: {error}"
    if not isinstance(error, RequestError):
        code = "insufficient_memory" if isinstance(error, CapacityError) else "server_error"
        return _row(key, custom_id, None, {"code": code, "message": message, "line": line_number})
    if not error.status_code:
        fields = {"code": error.code, "message": message, "param": error.param, "line": line_number}
        return _row(key, custom_id, None, fields)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}
    return _row(key, custom_id, {"status_code": error.status_code, "request_id": f"req_{key}", "body": body}, None)


def served_row(line: StoredLine, response: ServerResponse) -> bytes:
    """The row of a line that a remote server answered, well or not: the server's own body, untouched."""
    key = _key(line.line_number, line.custom_id)
    fields = {
        "status_code": response.status_code,
        "request_id": response.request_id or f"req_{key}",
        "body": response.body,
    }
    return _row(key, line.custom_id, fields, None)


def error_code_of(row: bytes) -> str:
    """The code of an error row, for counts; the HTTP status where a remote server gave none."""
    fields = json.loads(row)
    if fields["error"]:
        return str(fields["error"]["code"])
    error = fields["response"]["body"].get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if code and isinstance(code, str) else f"http_{fields['response']['status_code']}"


def _row(key: str, custom_id: str | None, response: object, error: object) -> bytes:
    fields = {"id": f"batch_req_{key}", "custom_id": custom_id, "response": response, "error": error}
    return _to_json(fields) + b"\n"


def _to_json(value: object) -> bytes:
    """JSON that is one line to every reader: also to those that break lines at U+0085, U+2028 and U+2029."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        return (text if text.isascii() else text.translate(_LINE_BREAKS)).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a remote server may answer
        return json.dumps(value, allow_nan=False).encode()


def _key(line_number: int, custom_id: str | None) -> str:
    return blake2b(f"{line_number} {custom_id}".encode(), digest_size=16).hexdigest()


def _usage(line: StoredLine, choices: Sequence[FinishedChoice]) -> dict[str, Any]:
    """A prompt counts once, however many choices it has; cached is what even its first choice did not compute."""
    prompts = [choices[begin : begin + line.n] for begin in range(0, len(choices), line.n)]
    num_prompt = sum(of_prompt[0].num_prompt_tokens for of_prompt in prompts)
    num_output = sum(choice.num_output_tokens for choice in choices)
    num_cached = sum(min(choice.num_cached_tokens for choice in of_prompt) for of_prompt in prompts)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def _choice_body(
    url: Url, choice: int, output: SequenceOutput, codec: Codec, sampling: SamplingParams
) -> dict[str, Any]:
    if url == EMBEDDINGS_URL:
        return {"object": "embedding", "index": choice, "embedding": output.embedding}
    text = codec.text_of(output, sampling)
    logprobs = output.logprobs
    ends_in_stop_token = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
    if ends_in_stop_token and not sampling.include_stop_str_in_output:
        logprobs = logprobs[:-1]  # of the stop token, which is no part of the text
    if url == CHAT_URL:
        return {
            "index": choice,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _chat_logprobs(logprobs, codec) if output.logprobs else None,
            "finish_reason": output.finish_reason,
        }
    return {
        "index": choice,
        "text": text,
        "logprobs": _completion_logprobs(logprobs, codec) if output.logprobs else None,
        "finish_reason": output.finish_reason,
    }


def _chat_logprobs(logprobs: Sequence[TokenLogprob], codec: Codec) -> dict[str, Any]:
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


def _completion_logprobs(logprobs: Sequence[TokenLogprob], codec: Codec) -> dict[str, Any]:
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

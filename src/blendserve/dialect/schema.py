"""One line of an OpenAI Batch file, already parsed as JSON -> a `BatchLine`, or the error that becomes its row.

Two kinds of error, as OpenAI draws the line: what never became a request (`status_code` 0: bad custom_id, method,
url, model) and what a server would answer with an HTTP status (everything about the body).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from blendserve.dialect.extras import (
    TEXT_ONLY,
    Abilities,
    Extras,
    read_embedding_extras,
    take_pictures,
    take_structure,
)
from blendserve.dialect.parameters import (
    BODY_FIELDS,
    check_token_ids,
    check_vocabulary,
    read_chat_parameters,
    read_completion_parameters,
    read_token_ids,
    reject,
    shown,
)
from blendserve.errors import RequestError
from blendserve.request import SamplingParams

Url = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
CHAT_URL: Url = "/v1/chat/completions"
COMPLETIONS_URL: Url = "/v1/completions"
EMBEDDINGS_URL: Url = "/v1/embeddings"
TEXT_URLS = (CHAT_URL, COMPLETIONS_URL)

Message = Mapping[str, str]
"""`role` and `content`, as a chat template reads them; `pictures`, where there are any, one `Picture` text a word."""
Prompt = str | tuple[int, ...] | tuple[Message, ...]

MAX_PROMPTS = 2048
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_EMPTY_MESSAGE_FIELDS = frozenset(
    ("name", "refusal", "audio", "annotations", "function_call", "tool_calls", "tool_call_id", "reasoning_content")
)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the answering model lets a line ask for.

    `names` are the model names a line may carry, the first being the one responses carry. `accepts_any_name` is for a
    user who chose the model himself: then one other name is taken too, if the whole file agrees on it. `vocab_size=0`
    and `max_model_len=0` mean: not known, not checked. `is_remote`: a server that checks bodies itself answers
    (see `passthrough`). `abilities`: what lines may ask for beyond text. Units: tokens.
    """

    names: tuple[str, ...]
    accepts_any_name: bool = False
    vocab_size: int = 0
    max_model_len: int = 0
    is_remote: bool = False
    abilities: Abilities = TEXT_ONLY

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def urls(self) -> tuple[Url, ...]:
        return (EMBEDDINGS_URL,) if self.abilities.embeds else TEXT_URLS


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One valid line. Chat has one prompt (its messages); a completions body may hold several.

    Choices are numbered as OpenAI does: prompt i has the choices [i * n, (i + 1) * n). `body` is what a remote server
    is sent, as JSON; where the line is answered here, what it asks for beyond text (`Extras`), mostly nothing.
    """

    line_number: int
    custom_id: str
    url: Url
    model: str | None
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    body: bytes = b""

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.sampling.n


def parse_line(value: object, line_number: int, served: ServedModel) -> BatchLine:
    """Validate one JSON value. Raises: RequestError with code, param and status."""
    custom_id, url, body = read_envelope(value, served.urls)
    model = _read_model(body, served)
    if url == EMBEDDINGS_URL:
        line = _parse_embedding(line_number, custom_id, model, body, served.abilities)
    else:
        line = _parse_text(line_number, custom_id, url, model, body, served.abilities)
    if served.vocab_size:
        _check_vocabulary(line, served.vocab_size)
    return line


def _parse_text(
    line_number: int, custom_id: str, url: Url, model: str | None, body: Mapping[str, Any], abilities: Abilities
) -> BatchLine:
    structure: Mapping[str, Any] | None = None
    if abilities.structures:
        body, structure = take_structure(body)
    conversation: tuple[Mapping[str, Any], ...] = ()
    if url == CHAT_URL:
        messages, has_pictures = _read_conversation(body, abilities)
        prompts: tuple[Prompt, ...] = (messages,)
        if has_pictures:
            conversation = tuple(
                {**given, "role": read["role"]} for given, read in zip(body["messages"], messages, strict=True)
            )
        sampling = read_chat_parameters(body)
    else:
        prompts = _read_prompts("prompt", body)
        sampling = read_completion_parameters(body)
    extras = Extras(adapter=_adapter_of(model, abilities), structure=structure, messages=conversation)
    return BatchLine(line_number, custom_id, url, model, prompts, sampling, extras.to_bytes())


def _parse_embedding(
    line_number: int, custom_id: str, model: str | None, body: Mapping[str, Any], abilities: Abilities
) -> BatchLine:
    """One request for each input; it generates nothing, which planning sees as one token."""
    extras = replace(read_embedding_extras(body), adapter=_adapter_of(model, abilities))
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)
    prompts = _read_prompts("input", body)
    return BatchLine(line_number, custom_id, EMBEDDINGS_URL, model, prompts, sampling, extras.to_bytes())


def _adapter_of(model: str | None, abilities: Abilities) -> str | None:
    return model if model in abilities.adapters else None


def read_envelope(value: object, urls: tuple[Url, ...] = TEXT_URLS) -> tuple[str, Url, dict[str, Any]]:
    """custom_id, url (one of `urls`) and body of a line, whatever the body holds. Raises: RequestError."""
    if not isinstance(value, dict):
        raise _line_error("invalid_json_line", f"the line is a JSON {_json_type(value)}; it must be an object")
    custom_id = _read_custom_id(value)
    _check_no_misplaced(value)
    url = _read_endpoint(value, urls)
    body = value.get("body")
    if not isinstance(body, dict):
        raise _line_error("missing_required_parameter", f"body is {shown(body)}; it must be an object", "body")
    return custom_id, url, body


def custom_id_of(value: object) -> str | None:
    """The custom_id of a line that may be otherwise invalid, for its error row."""
    custom_id = value.get("custom_id") if isinstance(value, dict) else None
    return custom_id if isinstance(custom_id, str) else None


def _line_error(code: str, message: str, param: str | None = None) -> RequestError:
    return RequestError(message, code=code, param=param, status_code=0)


def _json_type(value: object) -> str:
    names = {str: "string", list: "array", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _read_custom_id(value: Mapping[str, Any]) -> str:
    custom_id = value.get("custom_id")
    if custom_id is None:
        raise _line_error("missing_required_parameter", "custom_id is missing; every line needs its own", "custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise _line_error("invalid_custom_id", f"custom_id is {shown(custom_id)}; it must be a string", "custom_id")
    return custom_id


def _check_no_misplaced(value: Mapping[str, Any]) -> None:
    if len(value) > 4:
        for name in value:
            if name in BODY_FIELDS and name != "metadata":
                raise _line_error("unknown_parameter", f"{name} stands outside the body; move it into the body", name)


def _read_endpoint(value: Mapping[str, Any], urls: tuple[Url, ...]) -> Url:
    method, url = value.get("method"), value.get("url")
    if method != "POST":
        raise _line_error("invalid_method", f'method is {shown(method)}; it must be "POST"', "method")
    for known in urls:
        if url == known:
            return known
    raise _line_error("invalid_url", f"url is {shown(url)}; it must be {' or '.join(urls)}", "url")


def _read_model(body: Mapping[str, Any], served: ServedModel) -> str | None:
    model = body.get("model")
    if model is None:
        return None
    if not isinstance(model, str) or not model:
        reject("model", model, "a string", code="invalid_type")
    if model not in (*served.names, *served.abilities.adapters) and not served.accepts_any_name:
        raise RequestError(
            f"the line asks for model {shown(model)}, but the model here is {served.name}; give --model to choose the "
            "model yourself: it then answers lines that name another one",
            code="model_not_found",
            param="model",
            status_code=404,
        )
    return model


def _read_conversation(body: Mapping[str, Any], abilities: Abilities) -> tuple[tuple[Message, ...], bool]:
    """The messages as text, with what a plan needs of their pictures, and whether there are any."""
    if not abilities.sees:
        return _read_messages(body), False
    texts, pictures = take_pictures(body.get("messages"), abilities.image_domains)
    messages = _read_messages({"messages": texts})
    pictured = tuple(
        {**message, "pictures": " ".join(picture.to_text() for picture in of_message)} if of_message else message
        for message, of_message in zip(messages, pictures, strict=True)
    )
    return pictured, any(pictures)


def _read_messages(body: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = body.get("messages")
    if messages is None:
        raise RequestError("messages is missing", code="missing_required_parameter", param="messages")
    if not isinstance(messages, list) or not messages:
        reject("messages", messages, "a list of at least one message", code="invalid_type")
    return tuple(_read_message(f"messages[{index}]", message) for index, message in enumerate(messages))


def _read_message(name: str, message: Any) -> Message:
    if not isinstance(message, dict):
        reject(name, message, "an object", code="invalid_type")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        reject(f"{name}.role", role, f"one of {', '.join(_ROLES)}")
    if len(message) > 2:
        _check_message_fields(name, message)
    return {"role": _ROLES[role], "content": _read_content(f"{name}.content", message.get("content"))}


def _check_message_fields(name: str, message: Mapping[str, Any]) -> None:
    for field, value in message.items():
        if field in ("role", "content") or (field in _EMPTY_MESSAGE_FIELDS and (value is None or value == [])):
            continue
        raise RequestError(
            f"{name}.{field[:100]} is not supported and would change the prompt; remove it",
            code="unsupported_parameter" if field in _EMPTY_MESSAGE_FIELDS else "unknown_parameter",
            param=f"{name}.{field[:100]}",
        )


def _read_content(name: str, content: Any) -> str:
    """A string, or text parts joined by line breaks (as vLLM joins them for text-only templates)."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        reject(name, content, "a string or a list of text parts", code="invalid_type")
    return "\n".join(_read_part(f"{name}[{index}]", part) for index, part in enumerate(content))


def _read_part(name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise RequestError(
            f"{name} is of type {shown(kind)}; this model reads only text parts",
            code="unsupported_parameter",
            param=name,
        )
    text = part.get("text") if kind else None
    if not isinstance(text, str):
        reject(name, part, 'an object {"type": "text", "text": "..."}', code="invalid_type")
    return text


def _read_prompts(name: str, body: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """OpenAI's four forms: a string, a list of strings, a list of token ids, a list of lists of token ids."""
    prompt = body.get(name)
    if prompt is None:
        raise RequestError(f"{name} is missing", code="missing_required_parameter", param=name)
    if isinstance(prompt, str):
        return (_check_not_empty(name, prompt),)
    if not isinstance(prompt, list) or not prompt:
        reject(name, prompt, "a string or a list that is not empty", code="invalid_type")
    if type(prompt[0]) in (int, float):
        return (read_token_ids(name, prompt),)
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(
            f"{name} holds {len(prompt)} prompts; at most {MAX_PROMPTS}", code="invalid_value", param=name
        )
    return tuple(_read_one_prompt(f"{name}[{index}]", one) for index, one in enumerate(prompt))


def _read_one_prompt(name: str, prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return _check_not_empty(name, prompt)
    if not isinstance(prompt, list):
        reject(name, prompt, "a string or a list of token ids", code="invalid_type")
    return _check_not_empty(name, read_token_ids(name, prompt))


def _check_not_empty(name: str, prompt: str | tuple[int, ...]) -> Prompt:
    if not prompt:
        raise RequestError(f"{name} is empty; it needs at least one token", code="invalid_value", param=name)
    return prompt


def _check_vocabulary(line: BatchLine, vocab_size: int) -> None:
    check_vocabulary(line.sampling, vocab_size)
    for prompt in line.prompts:
        if isinstance(prompt, tuple) and isinstance(prompt[0], int):
            check_token_ids("input" if line.url == EMBEDDINGS_URL else "prompt", prompt, vocab_size)

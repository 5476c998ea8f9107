"""One line of an OpenAI Batch file, already parsed as JSON -> a `BatchLine`, or the error that becomes its row.

Two kinds of error, as OpenAI draws the line: what never became a request (`status_code` 0: bad custom_id, method,
url, model) and what a server would answer with an HTTP status (everything about the body).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blendserve.dialect.chat_options import CHAT_OPTION_FIELDS
from blendserve.dialect.defaults import with_defaults
from blendserve.dialect.endpoints import ENDPOINTS
from blendserve.dialect.extras import TEXT_ONLY, Abilities
from blendserve.dialect.grammars import check_grammar
from blendserve.dialect.parameters import BODY_FIELDS, check_token_ids, check_vocabulary
from blendserve.dialect.prompts import Prompt
from blendserve.dialect.structured import STRUCTURE_FIELDS
from blendserve.dialect.urls import CHAT_URL, COMPLETIONS_URL, RESPONSES_URL, canonical_url
from blendserve.dialect.values import reject, shown
from blendserve.errors import RequestError
from blendserve.request import SamplingParams

MAX_URL_CHARACTERS = 1000
_MISPLACED_FIELDS = (BODY_FIELDS | STRUCTURE_FIELDS | {"extra_body", *CHAT_OPTION_FIELDS}) - {"metadata"}
_PATH = re.compile(r"(/(?!\.\.?(/|$))[\w.~-]+)+", re.ASCII)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the answering model lets a line ask for.

    `names` are the model names a line may carry, the first being the one responses carry. `accepts_any_name` is for a
    user who chose the model himself: then one other name is taken too, if the whole file agrees on it. `vocab_size=0`
    and `max_model_len=0` mean: not known, not checked. `is_remote`: a server that checks bodies itself answers
    (see `passthrough`). `abilities`: what lines may ask for beyond text. `default_sampling`: parameters of a body that
    gives none. Units: tokens.
    """

    names: tuple[str, ...]
    accepts_any_name: bool = False
    vocab_size: int = 0
    max_model_len: int = 0
    is_remote: bool = False
    abilities: Abilities = TEXT_ONLY
    default_sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def urls(self) -> tuple[str, ...]:
        return self.abilities.urls


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One valid line. Chat has one prompt (its messages); a completions body may hold several.

    Choices are numbered as OpenAI does: prompt i has the choices [i * n, (i + 1) * n). `body` is what a remote server
    is sent, as JSON; where the line is answered here, what it asks for beyond text (`Extras`), mostly nothing. `digest`
    is a hash of the line as it was written. `embeds`: it is answered here, with vectors.
    """

    line_number: int
    custom_id: str
    url: str
    model: str | None
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    body: bytes = b""
    digest: bytes = b""
    embeds: bool = False

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.sampling.n


def parse_line(value: object, line_number: int, served: ServedModel) -> BatchLine:
    """Validate one JSON value. Raises: RequestError with code, param and status."""
    custom_id, url, given = read_envelope(value, served.urls)
    model = _read_model(given, served)
    body = with_extra_body(given)
    if served.default_sampling and not ENDPOINTS[url].embeds:
        body = _with_defaults(url, body, served.default_sampling)
    read = ENDPOINTS[url].read(body, served.abilities)
    structure = read.sampling.structured_outputs
    if structure is not None and served.abilities.checks_grammars:
        check_grammar(structure)
    adapter = _adapter_of(model, served.abilities)
    extras = read.extras if adapter is None else replace(read.extras, adapter=adapter)
    line = BatchLine(
        line_number, custom_id, url, model, read.prompts, read.sampling, extras.to_bytes(), b"", ENDPOINTS[url].embeds
    )
    if served.vocab_size:
        _check_vocabulary(line, served.vocab_size)
    return line


def _with_defaults(url: str, body: Mapping[str, Any], defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    if url == RESPONSES_URL:
        defaults = {"max_output_tokens" if name == "max_tokens" else name: defaults[name] for name in defaults}
    return with_defaults(body, defaults, is_completion=url == COMPLETIONS_URL)


def with_extra_body(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """A body with what stands in its `extra_body`: clients write parameters there, and send them beside the others.

    Raises: RequestError where it is no object, or names what the body names too.
    """
    extra = body.get("extra_body")
    if extra is None:
        return body if "extra_body" not in body else {name: body[name] for name in body if name != "extra_body"}
    if not isinstance(extra, dict):
        reject("extra_body", extra, "an object", code="invalid_type")
    for name in extra:
        if name in body:
            raise RequestError(
                f"{name[:100]} stands in the body and in extra_body; give it once",
                code="invalid_value",
                param=f"extra_body.{name[:100]}",
            )
    return {**{name: value for name, value in body.items() if name != "extra_body"}, **extra}


def _adapter_of(model: str | None, abilities: Abilities) -> str | None:
    return model if model in abilities.adapters else None


def read_envelope(value: object, urls: tuple[str, ...]) -> tuple[str, str, dict[str, Any]]:
    """custom_id, url (one of `urls`; any, where there are none) and body of a line, whatever the body holds.

    Raises: RequestError.
    """
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
    """The custom_id of a line that may be otherwise invalid, for its error row; a number as text."""
    custom_id = value.get("custom_id") if isinstance(value, dict) else None
    if type(custom_id) is int:
        return str(custom_id)
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
    if not isinstance(custom_id, str):
        remedy = "it must be a string" + (f': write "{custom_id}"' if type(custom_id) is int else "")
        raise _line_error("invalid_custom_id", f"custom_id is {shown(custom_id)}; {remedy}", "custom_id")
    if not custom_id:
        raise _line_error(
            "invalid_custom_id", "custom_id is an empty string; every line needs an id of its own", "custom_id"
        )
    return custom_id


def _check_no_misplaced(value: Mapping[str, Any]) -> None:
    if len(value) > 4:
        for name in value:
            if name in _MISPLACED_FIELDS:
                raise _line_error("unknown_parameter", f"{name} stands outside the body; move it into the body", name)


def _read_endpoint(value: Mapping[str, Any], urls: tuple[str, ...]) -> str:
    """One of `urls`, in any spelling; any path where there are none to choose from."""
    method, given = value.get("method"), value.get("url")
    if method != "POST":
        raise _line_error("invalid_method", f'method is {shown(method)}; it must be "POST"', "method")
    url = canonical_url(given) if isinstance(given, str) and len(given) <= MAX_URL_CHARACTERS else ""
    if url in urls or (not urls and _PATH.fullmatch(url)):
        return url
    wanted = " or ".join(urls) if urls else f"the path of an endpoint, such as {CHAT_URL}"
    raise _line_error("invalid_url", f"url is {shown(given)}; it must be {wanted}", "url")


def _read_model(body: Mapping[str, Any], served: ServedModel) -> str | None:
    model = body.get("model")
    if model is None:
        return None
    if not isinstance(model, str):
        reject("model", model, "a string", code="invalid_type")
    if not model:
        raise RequestError(
            "model is an empty string; name a model, or leave the field out", code="invalid_value", param="model"
        )
    if model not in (*served.names, *served.abilities.adapters) and not served.accepts_any_name:
        raise RequestError(
            f"the line asks for model {shown(model)}, but the model here is {served.name}; give --model to choose the "
            "model yourself: it then answers lines that name another one",
            code="model_not_found",
            param="model",
            status_code=404,
        )
    return model


def _check_vocabulary(line: BatchLine, vocab_size: int) -> None:
    check_vocabulary(line.sampling, vocab_size)
    for prompt in line.prompts:
        if isinstance(prompt, tuple) and isinstance(prompt[0], int):
            check_token_ids(ENDPOINTS[line.url].prompt_field, prompt, vocab_size)

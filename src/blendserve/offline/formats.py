"""`response_format` of `LLM.chat` -> sampling parameters that ask for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from blendserve.dialect.structured import check_structure, read_response_format
from blendserve.errors import ConfigError, RequestError
from blendserve.request import SamplingParams, StructuredOutputs

_OPENAI_TYPES = ("text", "json_object", "json_schema")


def with_format(
    params: SamplingParams | Iterable[SamplingParams] | None, response_format: Mapping[str, Any] | type | None
) -> SamplingParams | Iterable[SamplingParams] | None:
    """Parameters that ask for a format too. None leaves them as they are; without any, the default ones.

    Raises: ConfigError for a format that is not understood.
    """
    structure = None if response_format is None else structure_of(response_format)
    if structure is None:
        return params
    if params is None or isinstance(params, SamplingParams):
        return _asking(params or SamplingParams(), structure)
    return _asking_each(params, structure)


def structure_of(response_format: Mapping[str, Any] | type) -> StructuredOutputs | None:
    """A pydantic model (anything with `model_json_schema`), OpenAI's `response_format`, or a JSON schema.

    Raises: ConfigError for anything else.
    """
    make_schema = getattr(response_format, "model_json_schema", None)
    schema = make_schema() if callable(make_schema) else response_format
    if not isinstance(schema, Mapping):
        raise ConfigError(
            f"response_format is {response_format!r}; give a pydantic model, a JSON schema, or an object like "
            '{"type": "json_object"}'
        )
    try:
        if schema.get("type") in _OPENAI_TYPES:
            return read_response_format(dict(schema))
        return check_structure("response_format", {"json": dict(schema)})
    except RequestError as error:
        raise ConfigError(error.message) from None


def _asking(params: SamplingParams, structure: StructuredOutputs) -> SamplingParams:
    if params.structured_outputs is not None:
        raise ConfigError("response_format and structured_outputs both shape the answer; give one of them")
    return replace(params, structured_outputs=structure)


def _asking_each(params: Iterable[SamplingParams], structure: StructuredOutputs) -> Iterator[SamplingParams]:
    for each in params:
        yield _asking(each, structure)

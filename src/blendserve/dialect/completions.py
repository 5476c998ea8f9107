"""/v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blendserve.dialect.endpoint import AnsweredLine, Choice, Endpoint, ReadBody, text_usage
from blendserve.dialect.extras import Abilities
from blendserve.dialect.logprobs import completion_logprobs, logprobs_of_text
from blendserve.dialect.parameters import read_completion_parameters
from blendserve.dialect.prompts import read_prompts
from blendserve.dialect.structured import take_structure
from blendserve.dialect.urls import COMPLETIONS_URL


def _read(body: Mapping[str, Any], abilities: Abilities) -> ReadBody:  # noqa: ARG001
    body, structure = take_structure(body)
    sampling = read_completion_parameters(body)
    if structure is not None:
        sampling = replace(sampling, structured_outputs=structure)
    return ReadBody(read_prompts("prompt", body), sampling)


def _choice_body(choice: Choice) -> dict[str, Any]:
    output, codec = choice.output, choice.codec
    return {
        "index": choice.choice,
        "text": choice.text,
        "logprobs": completion_logprobs(logprobs_of_text(output, choice.sampling), codec) if output.logprobs else None,
        "finish_reason": output.finish_reason,
    }


def _body(answered: AnsweredLine) -> dict[str, Any]:
    return {
        "id": f"cmpl-{answered.key}",
        "object": "text_completion",
        "created": answered.created,
        "model": answered.model,
        "choices": [choice.body for choice in answered.choices],
        "usage": text_usage(answered),
        "system_fingerprint": None,
    }


COMPLETIONS = Endpoint(COMPLETIONS_URL, "prompt", _read, _choice_body, _body)

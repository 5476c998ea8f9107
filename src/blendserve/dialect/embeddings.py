"""/v1/embeddings: one request for each input; it generates nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from blendserve.dialect.endpoint import AnsweredLine, Choice, Endpoint, ReadBody
from blendserve.dialect.extras import Abilities, read_embedding_extras
from blendserve.dialect.prompts import read_prompts
from blendserve.dialect.urls import EMBEDDINGS_URL
from blendserve.request import SamplingParams


def _read(body: Mapping[str, Any], abilities: Abilities) -> ReadBody:
    extras = read_embedding_extras(body, abilities.max_dimensions)
    return ReadBody(read_prompts("input", body), SamplingParams(max_tokens=0, ignore_eos=True), extras)


def _choice_body(choice: Choice) -> dict[str, Any]:
    vector = choice.output.embedding
    assert vector is not None, "an answer of /v1/embeddings without a vector"
    encoded: str | list[float] = vector.tolist()
    if choice.extras.encoding_format == "base64":
        encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return {"object": "embedding", "index": choice.choice, "embedding": encoded}


def _body(answered: AnsweredLine) -> dict[str, Any]:
    num_tokens = sum(choice.num_prompt_tokens for choice in answered.choices)
    return {
        "object": "list",
        "data": [choice.body for choice in answered.choices],
        "model": answered.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


EMBEDDINGS = Endpoint(EMBEDDINGS_URL, "input", _read, _choice_body, _body, embeds=True)

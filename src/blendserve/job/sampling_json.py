"""Sampling parameters as the store keeps them: JSON of what is not a line's own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from blendserve.request import SamplingParams, StructuredOutputs

_LIST_FIELDS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")


def given_fields(structure: StructuredOutputs) -> dict[str, Any]:
    """What a structure says, for JSON."""
    return {name: value for name, value in asdict(structure).items() if value}


def sampling_from(values: dict[str, Any]) -> SamplingParams:
    """Parameters from the values of that JSON. Mutates: `values`."""
    for name in _LIST_FIELDS:
        values[name] = None if values[name] is None else tuple(values[name])
    values["logit_bias"] = {int(token_id): bias for token_id, bias in values["logit_bias"].items()}
    if structure := values.get("structured_outputs"):
        values["structured_outputs"] = StructuredOutputs(**{**structure, "choice": tuple(structure.get("choice", ()))})
    return SamplingParams(**values)

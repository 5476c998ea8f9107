"""Sampling parameters as the store keeps them: JSON of what is not a line's own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from blendserve.request import SamplingParams, StructuredOutputs


def given_fields(structure: StructuredOutputs) -> dict[str, Any]:
    """What a structure says, for JSON."""
    return {name: value for name, value in asdict(structure).items() if value}


def sampling_from(values: dict[str, Any]) -> SamplingParams:
    """Parameters from the values of that JSON. Mutates: `values`."""
    values["stop"] = tuple(values["stop"])
    values["stop_token_ids"] = tuple(values["stop_token_ids"])
    values["logit_bias"] = {int(token_id): bias for token_id, bias in values["logit_bias"].items()}
    if structure := values.get("structured_outputs"):
        values["structured_outputs"] = StructuredOutputs(**{**structure, "choice": tuple(structure.get("choice", ()))})
    return SamplingParams(**values)

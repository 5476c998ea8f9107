"""/v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blendserve.dialect.endpoint import AnsweredLine, Choice, Endpoint, ReadBody, text_usage
from blendserve.dialect.extras import Abilities, Extras
from blendserve.dialect.logprobs import completion_logprobs, logprobs_of_text, prompt_logprobs
from blendserve.dialect.parameters import read_completion_parameters
from blendserve.dialect.prompts import read_prompts
from blendserve.dialect.structured import take_structure
from blendserve.dialect.urls import COMPLETIONS_URL


def _read(body: Mapping[str, Any], _: Abilities) -> ReadBody:
    body, structure = take_structure(body)
    prompts = read_prompts("prompt", body)
    echo = tuple(prompt if isinstance(prompt, str) else None for prompt in prompts) if body.get("echo") is True else ()
    shows = body.get("prompt_logprobs") is not None
    extras = Extras(echo=echo, shows_prompt_logprobs=shows)
    sampling = read_completion_parameters(body)
    if structure is not None:
        sampling = replace(sampling, structured_outputs=structure)
    return ReadBody(prompts, sampling, extras)


def _choice_body(choice: Choice) -> dict[str, Any]:
    output, codec = choice.output, choice.codec
    body = {
        "index": choice.choice,
        "text": _echoed(choice) + choice.text,
        "logprobs": _logprobs(choice),
        "finish_reason": output.finish_reason,
    }
    if choice.extras.shows_prompt_logprobs:
        body["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or (), codec)
    return body


def _echoed(choice: Choice) -> str:
    """The prompt as it was given; as its tokens spell it where it was given as tokens."""
    if not choice.extras.echo:
        return ""
    text = choice.extras.echo[choice.choice // choice.line.n]
    if text is not None:
        return text
    return b"".join(choice.codec.token_bytes(int(token)) for token in choice.prompt_token_ids).decode(errors="replace")


def _logprobs(choice: Choice) -> dict[str, Any] | None:
    """Those of the prompt stand before those of the answer where the text begins with the prompt. The first token has
    none: nothing comes before it."""
    output, codec = choice.output, choice.codec
    of_text = list(zip(output.token_ids.tolist(), logprobs_of_text(output, choice.sampling), strict=False))
    if not choice.extras.echo or output.prompt_logprobs is None:
        return completion_logprobs(of_text, codec) if output.logprobs else None
    of_prompt = zip(map(int, choice.prompt_token_ids), output.prompt_logprobs, strict=True)
    return completion_logprobs([*of_prompt, *of_text], codec)


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

"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blendserve.dialect.endpoint import AnsweredLine, Choice, Endpoint, ReadBody, text_usage
from blendserve.dialect.extras import Abilities, Extras
from blendserve.dialect.logprobs import chat_logprobs, logprobs_of_text, prompt_logprobs
from blendserve.dialect.messages import read_conversation
from blendserve.dialect.parameters import read_chat_parameters
from blendserve.dialect.structured import take_structure
from blendserve.dialect.urls import CHAT_URL

_PROMPT_LOGPROBS = "prompt_logprobs"
"""vLLM's field for them, beside the choices: the first choice carries it there."""


def _read(body: Mapping[str, Any], abilities: Abilities) -> ReadBody:
    body, structure = take_structure(body)
    messages, has_pictures = read_conversation(body, abilities)
    conversation: tuple[Mapping[str, Any], ...] = ()
    if has_pictures:
        conversation = tuple(
            {**given, "role": read["role"]} for given, read in zip(body["messages"], messages, strict=True)
        )
    shows = body.get("prompt_logprobs") is not None
    extras = Extras(messages=conversation, shows_prompt_logprobs=shows)
    sampling = replace(read_chat_parameters(body), structured_outputs=structure)
    return ReadBody((messages,), sampling, extras)


def _choice_body(choice: Choice) -> dict[str, Any]:
    output, codec = choice.output, choice.codec
    body = {
        "index": choice.choice,
        "message": {"role": "assistant", "content": codec.text_of(output), "refusal": None},
        "logprobs": chat_logprobs(logprobs_of_text(output), codec) if output.logprobs else None,
        "finish_reason": output.finish_reason,
    }
    if choice.extras.shows_prompt_logprobs and choice.choice == 0:
        body[_PROMPT_LOGPROBS] = prompt_logprobs(output.prompt_logprobs or (), codec)
    return body


def _body(answered: AnsweredLine) -> dict[str, Any]:
    of_prompt = {name: value for name, value in answered.choices[0].body.items() if name == _PROMPT_LOGPROBS}
    return {
        "id": f"chatcmpl-{answered.key}",
        "object": "chat.completion",
        "created": answered.created,
        "model": answered.model,
        "choices": [
            {name: value for name, value in choice.body.items() if name not in of_prompt} for choice in answered.choices
        ],
        "usage": text_usage(answered),
        "system_fingerprint": None,
        **of_prompt,
    }


CHAT = Endpoint(CHAT_URL, "messages", _read, _choice_body, _body)

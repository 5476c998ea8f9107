"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blendserve.dialect.endpoint import AnsweredLine, Choice, Endpoint, ReadBody, text_usage
from blendserve.dialect.extras import Abilities, Extras
from blendserve.dialect.logprobs import chat_logprobs, logprobs_of_text
from blendserve.dialect.messages import read_conversation
from blendserve.dialect.parameters import read_chat_parameters
from blendserve.dialect.structured import take_structure, with_structure
from blendserve.dialect.urls import CHAT_URL


def _read(body: Mapping[str, Any], abilities: Abilities) -> ReadBody:
    body, structure = take_structure(body)
    messages, has_pictures = read_conversation(body, abilities)
    conversation: tuple[Mapping[str, Any], ...] = ()
    if has_pictures:
        conversation = tuple(
            {**given, "role": read["role"]} for given, read in zip(body["messages"], messages, strict=True)
        )
    sampling = with_structure(read_chat_parameters(body), structure, is_checked=abilities.checks_grammars)
    return ReadBody((messages,), sampling, Extras(messages=conversation))


def _choice_body(choice: Choice) -> dict[str, Any]:
    output, codec = choice.output, choice.codec
    return {
        "index": choice.choice,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": chat_logprobs(logprobs_of_text(output, choice.sampling), codec) if output.logprobs else None,
        "finish_reason": output.finish_reason,
    }


def _body(answered: AnsweredLine) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answered.key}",
        "object": "chat.completion",
        "created": answered.created,
        "model": answered.model,
        "choices": [choice.body for choice in answered.choices],
        "usage": text_usage(answered),
        "system_fingerprint": None,
    }


CHAT = Endpoint(CHAT_URL, "messages", _read, _choice_body, _body)

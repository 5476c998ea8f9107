"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from blendserve.dialect.chat_options import take_chat_options
from blendserve.dialect.endpoint import AnsweredLine, Choice, Endpoint, ReadBody, text_usage
from blendserve.dialect.extras import Abilities, Extras
from blendserve.dialect.logprobs import chat_logprobs, logprobs_of_text
from blendserve.dialect.messages import read_conversation
from blendserve.dialect.parameters import read_chat_parameters
from blendserve.dialect.structured import take_structure
from blendserve.dialect.tools import calls_body, conversation_of, structure_of, tools_of
from blendserve.dialect.urls import CHAT_URL
from blendserve.models.conversation import Conversation

_ROLES = {"developer": "system"}
"""What few templates know, under the name that all know."""


def _read(body: Mapping[str, Any], abilities: Abilities) -> ReadBody:
    body, structure = take_structure(body)
    messages, has_pictures = read_conversation(body, abilities)
    body, options = take_chat_options(body)
    sampling = read_chat_parameters(body)
    formats = abilities.chat
    conversation = conversation_of(messages, options, formats)
    structure, call_form = structure_of(options, structure, formats, forces_json=abilities.forces_json)
    extras = Extras(
        tools=tools_of(options, formats),
        call_form=call_form,
        named=options.named,
        is_parallel=options.is_parallel,
        includes_reasoning=options.includes_reasoning,
        num_id_characters=formats.tools.num_id_characters if formats.tools is not None and call_form else 0,
    )
    if has_pictures:
        extras = replace(extras, **_with_pictures(body, conversation))
    if structure is not None:
        sampling = replace(sampling, structured_outputs=structure)
    return ReadBody((conversation,), sampling, extras)


def _with_pictures(body: Mapping[str, Any], conversation: Conversation) -> dict[str, Any]:
    """The conversation as an engine that sees is given it."""
    given = [{**message, "role": _ROLES.get(message["role"], message["role"])} for message in body["messages"]]
    return {
        "messages": tuple(given),
        "template": {
            "tools": list(conversation.tools),
            "variables": dict(conversation.variables),
            "add_generation_prompt": conversation.add_generation_prompt and not conversation.continue_final_message,
            "continue_final_message": conversation.continue_final_message,
        },
    }


def _choice_body(choice: Choice) -> dict[str, Any]:
    output, extras = choice.output, choice.extras
    parts = choice.parts
    message: dict[str, Any] = {"role": "assistant", "content": parts.content, "refusal": None}
    if parts.calls:
        message["content"] = parts.content or None
        message["tool_calls"] = calls_body(parts.calls, choice.key, choice.choice, extras.num_id_characters)
    if parts.reasoning and extras.includes_reasoning:
        message |= {"reasoning_content": parts.reasoning, "reasoning": parts.reasoning}
    return {
        "index": choice.choice,
        "message": message,
        "logprobs": chat_logprobs(logprobs_of_text(output, choice.sampling), choice.codec) if output.logprobs else None,
        "finish_reason": "tool_calls" if parts.calls and output.finish_reason == "stop" else output.finish_reason,
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


CHAT = Endpoint(CHAT_URL, "messages", _read, _choice_body, _body, has_parts=True)

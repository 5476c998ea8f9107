"""Tools, calls and results written into messages, for chat templates that know nothing of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from blendserve.models.conversation import Conversation, Message, text_of_content
from blendserve.models.tool_formats.format import ToolCall, ToolFormat, to_json

_EXAMPLE = ToolCall("name_of_the_function", '{"name_of_an_argument": "value"}')


def with_tools_written(conversation: Conversation, format: ToolFormat) -> Conversation:
    """The same conversation in roles and texts alone. Tools go to the end of the system message."""
    messages = [_written(message, format) for message in conversation.messages]
    if conversation.tools:
        text = tools_text(conversation.tools, format)
        if messages[0]["role"] in ("system", "developer"):
            first = messages.pop(0)
            messages.insert(0, {**first, "content": f"{text_of_content(first['content'])}\n\n{text}"})
        else:
            messages.insert(0, {"role": "system", "content": text})
    return replace(conversation, messages=tuple(messages), tools=())


def tools_text(tools: Sequence[Mapping[str, Any]], format: ToolFormat) -> str:
    """What a model is told of the functions that it may call."""
    functions = "\n".join(to_json(tool["function"]) for tool in tools)
    return (
        f"You can call these functions. Each line is one function, its parameters as a JSON schema.\n{functions}\n"
        f"To call a function, write:\n{format.write_calls([_EXAMPLE])}"
    )


def _written(message: Message, format: ToolFormat) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": format.write_result(text_of_content(message["content"]))}
    if not message.get("tool_calls"):
        return message
    calls = [
        ToolCall(call["function"]["name"], to_json(call["function"]["arguments"])) for call in message["tool_calls"]
    ]
    said = text_of_content(message["content"])
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": "\n".join(part for part in (said, format.write_calls(calls)) if part)}

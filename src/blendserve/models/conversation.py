"""A conversation as a chat template takes it: messages, tools, and what else a template may be told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_COMMENTS = re.compile(r"\{#.*?#\}", re.DOTALL)

Message = Mapping[str, Any]
"""`role` and `content`: a text, or a list of parts `{"type": "text", "text": ...}`. Some also have `name`, `tool_calls`
(whose arguments are objects), `tool_call_id`, `reasoning_content`; `pictures`, where there are any, one `Picture` text
a word.
"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is rendered into one prompt. `tools` are in OpenAI's form. `variables` are what the caller tells the
    template beside the messages. `continue_final_message`: the answer goes on where the last message ends.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def text_of_content(content: Any) -> str:
    """A content as one text: parts are joined by line breaks, as vLLM joins them."""
    if isinstance(content, str):
        return content
    parts: Sequence[Mapping[str, Any]] = content or ()
    return "\n".join(str(part["text"]) for part in parts)


def num_characters(conversation: Conversation) -> int:
    """All text of a conversation, about."""
    return len(str(conversation.tools)) * bool(conversation.tools) + sum(
        len(text_of_content(message["content"])) + (len(str(message)) if len(message) > 2 else 0)
        for message in conversation.messages
    )


def reads_variable(source: str | None, name: str) -> bool:
    """Does a template's text mention `name`, comments aside? It is not parsed: it may come from anybody."""
    return source is not None and re.search(rf"\b{re.escape(name)}\b", _COMMENTS.sub("", source)) is not None

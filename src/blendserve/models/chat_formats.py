"""What is known of how one model chats: its formats of calls and reasoning, and what its chat template takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from blendserve.errors import ConfigError
from blendserve.models.conversation import reads_variable
from blendserve.models.reasoning_formats import (
    HARMONY_REASONING,
    REASONING_FORMATS,
    ReasoningFormat,
    recognised_reasoning,
)
from blendserve.models.tokenizer import Tokenizer
from blendserve.models.tool_formats.format import Tool, ToolCall, ToolFormat
from blendserve.models.tool_formats.table import TOOL_FORMATS, recognised_format
from blendserve.request import StructuredOutputs

Format = TypeVar("Format")

AUTO, NONE = "auto", "none"
TOOL_FORMAT_NAMES = (AUTO, NONE, *TOOL_FORMATS)
REASONING_FORMAT_NAMES = (AUTO, NONE, *REASONING_FORMATS)


class AnswerParts(NamedTuple):
    """An answer taken apart. `reasoning_end` is where the reasoning ends in its text."""

    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    reasoning_end: int = 0


NO_PARTS = AnswerParts("")


@dataclass(frozen=True, slots=True)
class ChatFormats:
    """`special_ids` are the ids of those markers that are special tokens. `renders_tools`, `renders_calls`: the chat
    template takes tools, and calls in a history. `variables` are told to the template of every conversation.
    """

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    special_ids: Mapping[str, int] = field(default_factory=dict)
    renders_tools: bool = False
    renders_calls: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        tool_format: str = AUTO,
        reasoning_format: str = AUTO,
        variables: Mapping[str, Any] | None = None,
    ) -> ChatFormats:
        """Those of a model, by name or recognised. Raises: ConfigError for an unknown name."""
        source = tokenizer.tool_template_source or tokenizer.chat_template_source
        tokens = tokenizer.added_texts
        tools = _chosen(tool_format, "tool_format", TOOL_FORMATS, recognised_format(source, tokens))
        reasoning = _chosen(
            reasoning_format, "reasoning_format", REASONING_FORMATS, recognised_reasoning(source, tokens)
        )
        markers = {*(tools.markers if tools else ()), *(reasoning.markers if reasoning else ())}
        special = tokenizer.special_token_ids
        return cls(
            tools=tools,
            reasoning=reasoning,
            special_ids={
                marker: token_id
                for marker in sorted(markers)
                if (token_id := tokenizer.backend.token_to_id(marker)) is not None and token_id in special
            },
            renders_tools=reads_variable(source, "tools"),
            renders_calls=reads_variable(source, "tool_calls"),
            variables=dict(variables or {}),
        )

    def settled(self, structure: StructuredOutputs, prompt: str) -> StructuredOutputs:
        """What an answer to a prompt must look like, once it has reasoned: where the prompt (its end is enough) opens
        the reasoning, it goes first; where it leaves that open, it may.
        """
        marks = self.reasoning
        if marks is None or marks is HARMONY_REASONING or structure.after or prompt.rstrip().endswith(marks.end):
            return structure
        return replace(structure, after=marks.end, begin="" if marks.is_open(prompt) else marks.begin)

    def take_apart(self, text: str, tools: Sequence[Tool], *, is_open: bool, may_call: bool) -> AnswerParts:
        """Reasoning, calls and content of an answer. Never raises."""
        if self.reasoning is HARMONY_REASONING or (self.tools is not None and self.tools.name == "harmony"):
            parsed = TOOL_FORMATS["harmony"].parse(text, tools)
            calls = parsed.calls if may_call else ()
            return AnswerParts(parsed.content, parsed.reasoning, calls, parsed.reasoning_end)
        reasoning, rest, end = "", text, 0
        if self.reasoning is not None:
            reasoning, rest, end = self.reasoning.split(text, is_open=is_open)
        if not may_call or self.tools is None:
            return AnswerParts(rest, reasoning, (), end)
        parsed = self.tools.parse(rest, tools)
        return AnswerParts(parsed.content, reasoning, parsed.calls, end)


def _chosen(name: str, option: str, known: Mapping[str, Format], recognised: Format | None) -> Format | None:
    if name == AUTO:
        return recognised
    if name == NONE:
        return None
    if name not in known:
        raise ConfigError(f"{option} is {name!r}; it must be {AUTO}, {NONE}, or one of {', '.join(known)}")
    return known[name]

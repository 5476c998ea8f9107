"""Tools of a chat body: how they reach the prompt, how an answer is held to them, and how its calls are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Literal, NoReturn

from blendserve.dialect.chat_options import ChatOptions
from blendserve.dialect.grammars import rule_of
from blendserve.dialect.structured import check_schema
from blendserve.errors import RequestError
from blendserve.models.chat_formats import ChatFormats
from blendserve.models.conversation import Conversation, Message
from blendserve.models.reasoning_formats import HARMONY_REASONING
from blendserve.models.tool_formats.format import CallGrammar, ParsedAnswer, Tool, ToolCall, Wanted, to_json
from blendserve.models.tool_formats.harmony import answered
from blendserve.models.tool_formats.lark import schema_of
from blendserve.models.tool_formats.table import TOOL_FORMATS
from blendserve.models.tool_formats.written import with_tools_written
from blendserve.request import StructuredOutputs

CallForm = Literal["", "text", "list", "arguments"]
"""How an answer writes its calls: not at all, in the model's format, as a JSON list of calls, or as the arguments of
one call."""
_TYPED_FORMATS = ("qwen3_coder",)
"""Formats whose arguments only a schema tells apart."""


def conversation_of(messages: Sequence[Message], options: ChatOptions, formats: ChatFormats) -> Conversation:
    """What is rendered. Raises: RequestError where tools or calls cannot reach the prompt."""
    conversation = Conversation(
        messages=tuple(messages),
        tools=options.tools if options.mode != "none" else (),
        variables={**formats.variables, **options.variables},
        add_generation_prompt=options.add_generation_prompt is not False,
        continue_final_message=options.continue_final_message,
    )
    if conversation.tools and formats.tools is None:
        _refuse_tools("tools", "how this model calls functions is not known")
    has_calls = any(message.get("tool_calls") for message in messages)
    is_written = (conversation.tools and not formats.renders_tools) or (has_calls and not formats.renders_calls)
    if not is_written:
        return conversation
    if formats.tools is None:
        _refuse_tools("messages", "the model's chat template leaves tool_calls out")
    if not formats.renders_tools:
        return with_tools_written(conversation, formats.tools)
    return replace(with_tools_written(replace(conversation, tools=()), formats.tools), tools=conversation.tools)


def _refuse_tools(name: str, reason: str) -> NoReturn:
    raise RequestError(
        f"{name} cannot be used: {reason}; name a format that it follows with --tool-format, such as hermes",
        code="unsupported_parameter",
        param=name,
    )


def tools_of(options: ChatOptions, formats: ChatFormats) -> tuple[Tool, ...]:
    """The functions that an answer may call, without what reading its calls does not need."""
    if options.mode == "none" or formats.tools is None:
        return ()
    tools = tuple(map(Tool.of, options.callable_tools))
    is_typed = formats.tools.name in _TYPED_FORMATS or formats.tools.name not in TOOL_FORMATS
    return tuple(Tool(tool.name, tool.parameters if is_typed else None) for tool in tools)


def structure_of(
    options: ChatOptions, structure: StructuredOutputs | None, formats: ChatFormats, *, forces_json: bool
) -> tuple[StructuredOutputs | None, CallForm]:
    """What an answer must look like, and how it writes its calls. `forces_json`: calls that are a must come as plain
    JSON, because the engine follows no grammar of the model's own format.

    Raises: RequestError where tools and another structure cannot both hold.
    """
    if options.mode == "none" or formats.tools is None:
        return (structure if forces_json else _on_its_channel(structure, formats)), ""
    for index, tool in enumerate(options.tools):
        check_schema(f"tools[{index}].function.parameters", tool["function"].get("parameters") or {})
    is_must = options.mode in ("required", "named")
    if structure is not None and is_must:
        raise RequestError(
            "tool_choice asks for a call, and the line asks for an answer of another shape; give one of them",
            code="invalid_value",
            param="tool_choice",
        )
    tools = tuple(map(Tool.of, options.callable_tools))
    if forces_json and is_must:
        return _forced_json(options, tools)
    wanted = Wanted(tools, options.is_parallel and options.mode != "named", formats.special_ids)
    if is_must:
        return StructuredOutputs(lark=formats.tools.forced(wanted)), "text"
    if structure is not None and forces_json:
        raise RequestError(
            "this engine cannot choose between a call and an answer of another shape; give one of them, or set "
            'tool_choice to "none"',
            code="unsupported_parameter",
            param="tools",
        )
    if structure is not None:
        return _either(replace_answer(wanted, structure), formats), "text"
    if options.is_strict and not forces_json:
        grammar: CallGrammar = formats.tools.begun(wanted)
        return StructuredOutputs(lark=grammar.lark, after=grammar.after), "text"
    return None, "text"


def replace_answer(wanted: Wanted, structure: StructuredOutputs) -> Wanted:
    """The same calls with what may stand instead of them."""
    return replace(wanted, answer_rule=rule_of(structure) or "")


def _on_its_channel(structure: StructuredOutputs | None, formats: ChatFormats) -> StructuredOutputs | None:
    """gpt-oss answers on a channel, behind its reasoning."""
    if structure is None or formats.reasoning is not HARMONY_REASONING:
        return structure
    rule = rule_of(structure)
    return structure if rule is None else StructuredOutputs(lark=answered(rule, formats.special_ids))


def _either(wanted: Wanted, formats: ChatFormats) -> StructuredOutputs:
    """A call, or an answer of a shape."""
    assert formats.tools is not None
    if not wanted.answer_rule:
        raise RequestError(
            'tools and a regex or a grammar cannot be combined; give one of them, or set tool_choice to "none"',
            code="invalid_value",
            param="tools",
        )
    return StructuredOutputs(lark=formats.tools.forced(wanted))


def _forced_json(options: ChatOptions, tools: Sequence[Tool]) -> tuple[StructuredOutputs, CallForm]:
    """Calls in vLLM's way: the arguments of the one that is named, or a list of calls."""
    if options.mode == "named":
        return StructuredOutputs(json=to_json(schema_of(tools[0]))), "arguments"
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "parameters": schema_of(tool)},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not options.is_parallel:
        schema["maxItems"] = 1
    return StructuredOutputs(json=to_json(schema)), "list"


def read_forced_json(text: str, form: str, named: str | None) -> ParsedAnswer:
    """The calls of such an answer; all of it is text where it was cut off."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ParsedAnswer(text)
    if form == "arguments":
        return (
            ParsedAnswer("", (ToolCall(named or "", to_json(value)),))
            if isinstance(value, dict)
            else ParsedAnswer(text)
        )
    listed = value if isinstance(value, list) else []
    calls = tuple(
        ToolCall(call["name"], to_json(call.get("parameters", {})))
        for call in listed
        if isinstance(call, dict) and isinstance(call.get("name"), str)
    )
    return ParsedAnswer("", calls) if calls and len(calls) == len(listed) else ParsedAnswer(text)


def call_id(key: str, choice: int, index: int, num_characters: int) -> str:
    """The id of a call, the same whenever the line is answered."""
    digest = blake2b(f"{key} {choice} {index}".encode(), digest_size=12).hexdigest()
    return digest[:num_characters] if num_characters else f"call_{digest}"


def calls_body(calls: Sequence[ToolCall], key: str, choice: int, num_id_characters: int) -> list[Mapping[str, Any]]:
    """`tool_calls` of a message."""
    return [
        {
            "id": call_id(key, choice, index, num_id_characters),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for index, call in enumerate(calls)
    ]

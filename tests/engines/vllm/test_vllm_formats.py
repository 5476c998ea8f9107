"""Calls in answers of vLLM: read by its parsers, by ours where those fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from chat_templates import CHATML, HARMONY_LIKE, HERMES_LIKE
from tiny_files import byte_level_tokenizer

from blendserve.engines.vllm.fake import FakeVllm
from blendserve.engines.vllm.formats import PARSERS, vllm_formats
from blendserve.errors import ConfigError
from blendserve.models.chat_settings import ChatSettings
from blendserve.models.tokenizer import Tokenizer
from blendserve.models.tool_formats.format import ParsedAnswer, Tool, ToolCall
from blendserve.models.tool_formats.table import TOOL_FORMATS
from blendserve.request import StructuredOutputs

TOOLS = (Tool("now"),)
CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


def tokenizer(template: str) -> Tokenizer:
    return Tokenizer(byte_level_tokenizer(300), (2,), chat_template_source=template)


def test_a_parser_of_vllm_by_name() -> None:
    formats = vllm_formats(ChatSettings(tool_format="shout"), tokenizer(CHATML), FakeVllm(), "m")
    assert formats.tools is not None
    assert formats.tools.parse("NOW", TOOLS) == ParsedAnswer("", (ToolCall("now", "{}"),))
    assert formats.tools.parse("THEN", TOOLS) == ParsedAnswer("THEN"), "there is no such function"
    assert "</s>" not in formats.special_ids
    unread = vllm_formats(ChatSettings(tool_format="shout"), tokenizer(CHATML), None, "m")
    assert unread.tools is not None
    assert unread.tools.name == "shout"
    with pytest.raises(ConfigError, match="no parser xyz"):
        vllm_formats(ChatSettings(tool_format="xyz"), tokenizer(CHATML), FakeVllm(), "m")


def test_a_reasoning_parser_of_vllm_by_name() -> None:
    formats = vllm_formats(ChatSettings(reasoning_format="murmur"), tokenizer(CHATML), FakeVllm(), "m")
    parts = formats.take_apart("(so) 4", (), is_open=False, may_call=False)
    assert (parts.reasoning, parts.content, parts.reasoning_end) == ("so", "4", 4)
    parts = formats.take_apart("no bracket", (), is_open=False, may_call=False)
    assert (parts.reasoning, parts.content) == ("", "no bracket"), "the parser failed"
    schema = StructuredOutputs(json="{}")
    assert formats.settled(schema, "Hi (") == replace(schema, after=")")
    assert formats.settled(schema, "Hi") == replace(schema, after=")", begin="(")
    assert vllm_formats(ChatSettings(reasoning_format="murmur"), tokenizer(CHATML), None, "m").reasoning is None
    with pytest.raises(ConfigError, match="no parser xyz"):
        vllm_formats(ChatSettings(reasoning_format="xyz"), tokenizer(CHATML), FakeVllm(), "m")


def test_calls_that_a_parser_of_vllm_leaves_out_are_read_by_ours() -> None:
    class Silent(FakeVllm):
        def parse_calls(self, name: str, model: str, text: str, tools: Sequence[Tool]) -> ParsedAnswer:  # noqa: ARG002
            return ParsedAnswer(text)

    formats = vllm_formats(ChatSettings(), tokenizer(HERMES_LIKE), Silent(), "m")
    assert formats.tools is not None
    cut_off = f'{CALL}\n<tool_call>{{"name": "no'
    assert formats.tools.parse(cut_off, TOOLS).calls == (ToolCall("now", "{}"),)


def test_ours_reads_what_a_parser_of_vllm_cannot() -> None:
    formats = vllm_formats(ChatSettings(), tokenizer(HERMES_LIKE), FakeVllm(), "m")
    assert formats.tools is not None
    assert formats.tools.parse(CALL, TOOLS).calls == (ToolCall("now", "{}"),)
    assert formats.reasoning is not None


def test_formats_without_a_parser_of_vllm_stay_ours() -> None:
    assert set(TOOL_FORMATS) - set(PARSERS) == {"harmony"}
    formats = vllm_formats(ChatSettings(), tokenizer(HARMONY_LIKE), FakeVllm(), "m")
    assert formats.tools is TOOL_FORMATS["harmony"]
    assert vllm_formats(ChatSettings(tool_format="none"), tokenizer(HERMES_LIKE), FakeVllm(), "m").tools is None

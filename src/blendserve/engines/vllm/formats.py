"""How answers of a model in vLLM are read: calls by vLLM's own parsers, ours where it has none or finds none.

Reasoning is read by vLLM's parsers where they are asked for by name. Formats that we know are read by us, as vLLM does,
but for what its parsers do not see: whether the prompt has opened the reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from blendserve.engines.vllm.api import VllmApi
from blendserve.errors import RequestError
from blendserve.models.chat_formats import NONE, REASONING_FORMAT_NAMES, TOOL_FORMAT_NAMES, ChatFormats
from blendserve.models.chat_settings import ChatSettings
from blendserve.models.reasoning_formats import ReasoningFormat, SplitAnswer
from blendserve.models.tokenizer import Tokenizer
from blendserve.models.tool_formats.format import ParsedAnswer, Tool, ToolFormat, Wanted
from blendserve.models.tool_formats.hermes import write_calls, write_result

PARSERS = {"hermes": "hermes", "llama3": "llama3_json", "mistral": "mistral", "qwen3_coder": "qwen3_coder"}
"""vLLM's names of our formats. gpt-oss has none here: its calls and its reasoning are read together."""


@dataclass(frozen=True, slots=True)
class VllmParse:
    """Reads calls by vLLM's parser `name`. `ours` reads what it cannot, and calls of functions that there are none."""

    api: VllmApi
    name: str
    model: str
    ours: Callable[[str, Sequence[Tool]], ParsedAnswer]

    def __call__(self, text: str, tools: Sequence[Tool]) -> ParsedAnswer:
        try:
            found = self.api.parse_calls(self.name, self.model, text, tools)
        except Exception:  # noqa: BLE001  # parsers of other people's, on texts of models
            return self.ours(text, tools)
        names = {tool.name for tool in tools}
        is_read = bool(found.calls) and all(call.name in names for call in found.calls)
        return found if is_read else self.ours(text, tools)


@dataclass(frozen=True, slots=True)
class VllmReasoning(ReasoningFormat):
    """Reasoning as vLLM's parser `name` tells it. `begin` and `end` are empty where the parser has no such markers."""

    api: VllmApi
    model: str

    def is_open(self, prompt: str) -> bool:
        return bool(self.begin) and prompt.rstrip().endswith(self.begin)

    def split(self, text: str, *, is_open: bool) -> SplitAnswer:  # noqa: ARG002
        try:
            reasoning, content = self.api.parse_reasoning(self.name, self.model, text)
        except Exception:  # noqa: BLE001  # parsers of other people's, on texts of models
            return SplitAnswer("", text, 0)
        if not reasoning:
            return SplitAnswer("", content, 0)
        end = len(text) - len(content) if text.endswith(content) else len(reasoning)
        return SplitAnswer(reasoning.strip(), content.lstrip(), end)


def vllm_formats(chat: ChatSettings, tokenizer: Tokenizer, api: VllmApi | None, model: str) -> ChatFormats:
    """How a model chats; `chat.tool_format` and `chat.reasoning_format` may also be names of parsers of vLLM. Without
    `api`, lines can be read and no answers. Raises: ConfigError.
    """
    if chat.reasoning_format not in REASONING_FORMAT_NAMES:
        formats = vllm_formats(replace(chat, reasoning_format=NONE), tokenizer, api, model)
        return formats if api is None else _with_reasoning(formats, chat.reasoning_format, tokenizer, api, model)
    if chat.tool_format not in TOOL_FORMAT_NAMES:
        if api is not None:
            api.check_parser(chat.tool_format)
        formats = replace(chat, tool_format=NONE).formats(tokenizer)
        ends = {tokenizer.backend.id_to_token(token_id) for token_id in tokenizer.eos_token_ids}
        markers = tuple(text for text in tokenizer.special_texts if text not in ends)
        ids = {text: int(tokenizer.backend.token_to_id(text) or 0) for text in markers}
        parse = _as_text if api is None else VllmParse(api, chat.tool_format, model, _as_text)
        other = ToolFormat(chat.tool_format, markers, parse, _no_grammar, _no_grammar, write_calls, write_result)
        return replace(formats, tools=other, special_ids={**formats.special_ids, **ids})
    formats = chat.formats(tokenizer)
    if api is None or formats.tools is None or formats.tools.name not in PARSERS:
        return formats
    parse = VllmParse(api, PARSERS[formats.tools.name], model, formats.tools.parse)
    return replace(formats, tools=replace(formats.tools, parse=parse))


def _with_reasoning(formats: ChatFormats, name: str, tokenizer: Tokenizer, api: VllmApi, model: str) -> ChatFormats:
    """Raises: ConfigError where vLLM has no parser of this name for this model."""
    begin, end = api.reasoning_marks(name, model)
    special = tokenizer.special_token_ids
    ids = {
        mark: token_id
        for mark in (begin, end)
        if mark and (token_id := tokenizer.backend.token_to_id(mark)) is not None and token_id in special
    }
    return replace(
        formats, reasoning=VllmReasoning(name, begin, end, api, model), special_ids={**formats.special_ids, **ids}
    )


def _as_text(text: str, tools: Sequence[Tool]) -> ParsedAnswer:  # noqa: ARG001
    return ParsedAnswer(text)


def _no_grammar(wanted: Wanted) -> NoReturn:  # noqa: ARG001
    raise RequestError("vLLM follows no grammar of calls", code="unsupported_parameter", param="tools")

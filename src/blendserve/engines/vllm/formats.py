"""How answers of a model in vLLM are read: calls by vLLM's own parsers, ours where it has none or it fails.

Reasoning is always told apart by us: what the prompt has opened, a parser of vLLM cannot know here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from blendserve.engines.vllm.api import VllmApi
from blendserve.errors import RequestError
from blendserve.models.chat_formats import NONE, TOOL_FORMAT_NAMES, ChatFormats
from blendserve.models.chat_settings import ChatSettings
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
        return found if all(call.name in names for call in found.calls) else self.ours(text, tools)


def vllm_formats(chat: ChatSettings, tokenizer: Tokenizer, api: VllmApi, model: str) -> ChatFormats:
    """How a model chats; `chat.tool_format` may also be the name of a parser of vLLM. Raises: ConfigError."""
    if chat.tool_format not in TOOL_FORMAT_NAMES:
        api.check_parser(chat.tool_format)
        formats = replace(chat, tool_format=NONE).formats(tokenizer)
        ends = {tokenizer.backend.id_to_token(token_id) for token_id in tokenizer.eos_token_ids}
        markers = tuple(text for text in tokenizer.special_texts if text not in ends)
        ids = {text: int(tokenizer.backend.token_to_id(text) or 0) for text in markers}
        parse = VllmParse(api, chat.tool_format, model, _as_text)
        other = ToolFormat(chat.tool_format, markers, parse, _no_grammar, _no_grammar, write_calls, write_result)
        return replace(formats, tools=other, special_ids={**formats.special_ids, **ids})
    formats = chat.formats(tokenizer)
    if formats.tools is None or formats.tools.name not in PARSERS:
        return formats
    parse = VllmParse(api, PARSERS[formats.tools.name], model, formats.tools.parse)
    return replace(formats, tools=replace(formats.tools, parse=parse))


def _as_text(text: str, tools: Sequence[Tool]) -> ParsedAnswer:  # noqa: ARG001
    return ParsedAnswer(text)


def _no_grammar(wanted: Wanted) -> NoReturn:  # noqa: ARG001
    raise RequestError("vLLM follows no grammar of calls", code="unsupported_parameter", param="tools")

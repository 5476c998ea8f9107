"""All formats of tool calls by name, and how a model's is recognised: by its chat template, else by its tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from blendserve.models.tool_formats.format import ToolFormat
from blendserve.models.tool_formats.harmony import HARMONY
from blendserve.models.tool_formats.hermes import HERMES
from blendserve.models.tool_formats.llama3 import LLAMA3
from blendserve.models.tool_formats.mistral import MISTRAL
from blendserve.models.tool_formats.qwen3_coder import QWEN3_CODER


class _Entry(NamedTuple):
    """`is_in` looks at the text of a chat template, `tokens` are all among the tokens of a model without one."""

    format: ToolFormat
    is_in: Callable[[str], bool]
    tokens: tuple[str, ...] = ()


_ENTRIES = (
    _Entry(HARMONY, lambda source: "<|channel|>" in source and "<|message|>" in source, ("<|channel|>", "<|message|>")),
    _Entry(QWEN3_CODER, lambda source: "<function=" in source and "<parameter=" in source),
    _Entry(MISTRAL, lambda source: "[TOOL_CALLS]" in source, ("[TOOL_CALLS]",)),
    _Entry(HERMES, lambda source: "<tool_call>" in source and "<arg_key>" not in source, ("<tool_call>",)),
    _Entry(LLAMA3, lambda source: "<|start_header_id|>" in source and '"parameters"' in source),
)
"""In the order in which they are looked for: a format whose marks others have too stands behind those."""

TOOL_FORMATS: Mapping[str, ToolFormat] = {entry.format.name: entry.format for entry in _ENTRIES}


def recognised_format(template: str | None, tokens: Collection[str]) -> ToolFormat | None:
    """The format of a model with this chat template and these added tokens; None where it is none of ours."""
    for entry in _ENTRIES:
        if template is not None and entry.is_in(template):
            return entry.format
    for entry in _ENTRIES:
        if template is None and entry.tokens and all(token in tokens for token in entry.tokens):
            return entry.format
    return None

"""Offline batch inference for large language models, planned so that compute and memory bandwidth overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blendserve.offline.llm import LLM
    from blendserve.offline.outputs import CompletionOutput, RequestOutput
    from blendserve.request import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]

_MODULE_BY_NAME = {
    "LLM": "blendserve.offline.llm",
    "CompletionOutput": "blendserve.offline.outputs",
    "RequestOutput": "blendserve.offline.outputs",
    "SamplingParams": "blendserve.request",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for only then: `import blendserve` and `blendserve --help` stay quick."""
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module 'blendserve' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULE_BY_NAME[name]), name)

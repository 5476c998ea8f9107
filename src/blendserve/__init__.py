"""Offline batch inference for large language models, planned so that compute and memory bandwidth overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blendserve.engines.settings import HttpSettings, NativeSettings, ReplicaSettings, VllmSettings
    from blendserve.job.interrupts import JobInterrupted
    from blendserve.job.job import JobProgress, JobReport
    from blendserve.job.reader import ReadLimits
    from blendserve.models.chat_settings import ChatSettings
    from blendserve.offline.batch import run_batch, run_batches
    from blendserve.offline.llm import LLM
    from blendserve.offline.outputs import CompletionOutput, EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
    from blendserve.request import SamplingParams, StructuredOutputs
    from blendserve.tables.api import map, map_file

__all__ = [
    "LLM",
    "ChatSettings",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "HttpSettings",
    "JobInterrupted",
    "JobProgress",
    "JobReport",
    "NativeSettings",
    "ReadLimits",
    "ReplicaSettings",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "VllmSettings",
    "map",
    "map_file",
    "run_batch",
    "run_batches",
]

_NAMES_BY_MODULE = {
    "blendserve.engines.settings": ("HttpSettings", "NativeSettings", "ReplicaSettings", "VllmSettings"),
    "blendserve.job.interrupts": ("JobInterrupted",),
    "blendserve.job.job": ("JobProgress", "JobReport"),
    "blendserve.job.reader": ("ReadLimits",),
    "blendserve.models.chat_settings": ("ChatSettings",),
    "blendserve.offline.batch": ("run_batch", "run_batches"),
    "blendserve.offline.llm": ("LLM",),
    "blendserve.offline.outputs": ("CompletionOutput", "EmbeddingOutput", "EmbeddingRequestOutput", "RequestOutput"),
    "blendserve.request": ("SamplingParams", "StructuredOutputs"),
    "blendserve.tables.api": ("map", "map_file"),
}
_MODULE_BY_NAME = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load what is asked for only then: `import blendserve` and `blendserve --help` stay quick."""
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module 'blendserve' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULE_BY_NAME[name]), name)

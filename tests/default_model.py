"""The default model, fetched on first use: for tests marked `model`."""

from __future__ import annotations

from functools import cache

from blendserve.host import cache_dir
from blendserve.models.hub import ModelFiles, resolve
from blendserve.models.load import LoadedModel, load_model

PARAGRAPH = (
    "The first railway lines were built to carry coal and ore from the mines to the nearest canal. Horses pulled the "
    "waggons along wooden rails, which wore out quickly and were soon covered with plates of iron. When steam engines "
    "became small enough to be put on wheels, the same rails carried people too, and within thirty years a journey "
    "that had taken two days by coach could be made between breakfast and dinner. Towns that the railway reached grew; "
    "towns that it passed by often shrank, and some of them have never recovered."
)
"""Written for this project, so that no model has seen it in training."""


@cache
def default_files() -> ModelFiles:
    return resolve(None, cache_dir())


@cache
def default_model() -> LoadedModel:
    return load_model(default_files())

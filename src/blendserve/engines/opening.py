"""From settings to an engine. An engine's modules are imported when it is opened: none needs what others need."""

from __future__ import annotations

from blendserve.engines.base import Engine, Notify, RunObserver
from blendserve.engines.settings import EngineSettings, HttpSettings, ReplicaSettings, SingleSettings, VllmSettings


def _ignore(_: str) -> None:
    """Tell nobody."""


def open_engine(settings: EngineSettings, *, notify: Notify = _ignore, observer: RunObserver | None = None) -> Engine:
    """Open the engine that settings describe. Weights are loaded when there is something to run.

    `notify` is told what happens meanwhile; `observer` watches runs on the native engine of this process.
    Raises: ConfigError when the model, the settings or this installation do not allow it.
    """
    if isinstance(settings, ReplicaSettings):
        from blendserve.engines.replicas.engine import ReplicatedEngine

        return ReplicatedEngine(settings, open_single, notify=notify)
    return open_single(settings, notify=notify, observer=observer)


def open_single(settings: SingleSettings, *, notify: Notify = _ignore, observer: RunObserver | None = None) -> Engine:
    """Open an engine of this process. Raises: ConfigError."""
    if isinstance(settings, HttpSettings):
        from blendserve.engines.http.engine import open_http

        return open_http(settings, notify=notify)
    if isinstance(settings, VllmSettings):
        from blendserve.engines.vllm.engine import open_vllm

        return open_vllm(settings, notify=notify)
    from blendserve.engines.native.engine import open_native

    return open_native(settings, notify=notify, observer=observer)

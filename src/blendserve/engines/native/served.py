"""What lines may ask of the native engine, from the model's files alone: no kernel is needed for it."""

from __future__ import annotations

from blendserve.config import EngineConfig
from blendserve.dialect.defaults import checked_defaults
from blendserve.dialect.extras import native_abilities
from blendserve.dialect.schema import ServedModel
from blendserve.engine.limits import resolve_limits
from blendserve.engines.settings import NativeSettings
from blendserve.models.generation_config import sampling_defaults
from blendserve.models.hub import ModelFiles
from blendserve.models.load import LoadedModel


def served_model_of(settings: NativeSettings, files: ModelFiles, model: LoadedModel) -> ServedModel:
    """Lines may carry the model's own name; where the user chose the model, any one other name too.

    Raises: ConfigError when the model was not made for the context length asked for, or its sampling is no sampling.
    """
    limits = resolve_limits(EngineConfig(max_model_len=settings.config().max_model_len), model.spec)
    return ServedModel(
        names=(model.spec.name,),
        accepts_any_name=settings.model is not None,
        vocab_size=model.spec.vocab_size,
        max_model_len=limits.max_model_len,
        default_sampling=checked_defaults(sampling_defaults(files, settings.generation_config)),
        abilities=native_abilities(model.spec.hidden_size, settings.chat.formats(model.tokenizer)),
    )

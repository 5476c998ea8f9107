"""Open a model: its shape, its weights and its tokenizer, from either kind of file."""

from __future__ import annotations

from dataclasses import dataclass, replace

from blendserve.errors import ConfigError
from blendserve.models.ends import united
from blendserve.models.hf_config import spec_from_hf_config
from blendserve.models.hub import ModelFiles
from blendserve.models.pooling import LAST_TOKEN, Pooling, pooling_from_directory
from blendserve.models.spec import ModelSpec
from blendserve.models.tokenizer import Tokenizer, read_json
from blendserve.models.weights import Weights, check_weights


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for an executor. `spec.eos_token_ids` are the ends that any of its files names."""

    spec: ModelSpec
    weights: Weights
    tokenizer: Tokenizer
    pooling: Pooling = LAST_TOKEN


def load_model(files: ModelFiles) -> LoadedModel:
    """Open a model without reading its weights' data; every name and shape is checked.

    Raises: ConfigError when the architecture is not supported or a file is missing or damaged.
    """
    spec, weights, tokenizer = _from_gguf(files) if files.is_gguf else _from_directory(files)
    pooling = LAST_TOKEN if files.is_gguf else pooling_from_directory(files.path)
    check_weights(spec, weights)
    ends = united(tokenizer.eos_token_ids, spec.eos_token_ids)
    spec = replace(spec, eos_token_ids=tuple(token_id for token_id in ends if token_id < spec.vocab_size))
    tokenizer.num_embeddings = spec.vocab_size
    return LoadedModel(spec, weights, tokenizer, pooling)


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Open a model's tokenizer only. Raises: ConfigError when it is missing, damaged or of an unknown kind."""
    if not files.is_gguf:
        from blendserve.models.tokenizer_directory import tokenizer_from_directory

        return tokenizer_from_directory(files.path)
    from blendserve.models.gguf_file import GgufFile
    from blendserve.models.gguf_tokenizer import tokenizer_from_gguf

    return tokenizer_from_gguf(GgufFile(files.path))


def _from_gguf(files: ModelFiles) -> tuple[ModelSpec, Weights, Tokenizer]:
    from blendserve.models.gguf_file import GgufFile
    from blendserve.models.gguf_spec import spec_from_gguf
    from blendserve.models.gguf_tokenizer import tokenizer_from_gguf
    from blendserve.models.gguf_weights import GgufWeights

    file = GgufFile(files.path)
    spec = spec_from_gguf(files.name, file)
    return spec, GgufWeights(file, spec), tokenizer_from_gguf(file)


def _from_directory(files: ModelFiles) -> tuple[ModelSpec, Weights, Tokenizer]:
    from blendserve.models.safetensors import SafetensorsWeights
    from blendserve.models.tokenizer_directory import tokenizer_from_directory

    config = read_json(files.path / "config.json")
    if not config:
        raise ConfigError(f"{files.path} has no config.json; give a model directory, a .gguf file or a hub id")
    spec = spec_from_hf_config(files.name, config)
    weights = SafetensorsWeights(files.path, spec.has_tied_embeddings, spec.vocab_size)
    return spec, weights, tokenizer_from_directory(files.path)

"""What a plan or a simulation is for: a model by its shape alone, and the hardware under it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blendserve.config import EngineConfig, KvDtype
from blendserve.costs.hardware import HARDWARE_BY_NAME, known_hardware
from blendserve.dialect.defaults import checked_defaults
from blendserve.errors import ConfigError
from blendserve.host import cache_dir
from blendserve.models.generation_config import FROM_MODEL, sampling_defaults
from blendserve.models.hf_config import spec_from_hf_config
from blendserve.models.hub import DESCRIPTION_PATTERNS, ModelFiles, resolve
from blendserve.models.known import MODEL_BY_NAME
from blendserve.models.load import load_tokenizer
from blendserve.models.spec import ModelSpec
from blendserve.models.tokenizer import Tokenizer, read_json
from blendserve.simulator.machine import EngineKind, Machine, gpu_machine, is_calibrated, this_machine

THIS_MACHINE = "this-machine"
DEFAULT_HARDWARE = "a100-80g"
HARDWARE_NAMES = (*HARDWARE_BY_NAME, THIS_MACHINE)


@dataclass(frozen=True, slots=True)
class Target:
    """A model's shape, and its files where there are any."""

    spec: ModelSpec
    files: ModelFiles | None


def find_target(name: str | None, *, notify: Callable[[str], None]) -> Target:
    """The shape of a model: of a known name, of a config.json, or of a model's files. Raises: ConfigError."""
    if name in MODEL_BY_NAME:
        return Target(MODEL_BY_NAME[name], None)
    if name is not None and name.endswith(".json"):
        return Target(_spec_from_config(Path(name).expanduser()), None)
    try:
        files = resolve(name, cache_dir(), notify=notify, hub_patterns=DESCRIPTION_PATTERNS)
    except ConfigError as error:
        if name is None or "/" in name:
            raise
        raise ConfigError(f"{error}; known shapes: {', '.join(MODEL_BY_NAME)}; or give a config.json") from None
    return Target(_spec_from_files(files), files)


def sampling_of(target: Target, source: str) -> Mapping[str, Any]:
    """Sampling parameters that `source` gives where a line has none. Raises: ConfigError."""
    if target.files is None and source == FROM_MODEL:
        return {}
    return checked_defaults(sampling_defaults(target.files or ModelFiles(target.spec.name, Path()), source))


def find_tokenizer(name: str | None, target: Target, *, notify: Callable[[str], None]) -> tuple[Tokenizer, str | None]:
    """A tokenizer, and whose it is where that is not the target's own model."""
    if name is None and target.files is not None:
        return load_tokenizer(target.files), None
    files = resolve(name, cache_dir(), notify=notify, hub_patterns=DESCRIPTION_PATTERNS)
    return load_tokenizer(files), files.name


def find_machine(
    hardware: str | None,
    spec: ModelSpec,
    engine: EngineKind = "overlapped",
    *,
    tensor_parallel: int = 1,
    kv_dtype: KvDtype = "bf16",
    config: EngineConfig | None = None,
) -> Machine:
    """One replica on the hardware that was asked for; without a word on it, this machine if it is calibrated or
    `config` says how it is run.

    Raises: ConfigError when there is no calibration; CapacityError when the weights do not fit.
    """
    name = hardware or (THIS_MACHINE if config is not None or is_calibrated(kv_dtype=kv_dtype) else DEFAULT_HARDWARE)
    if name != THIS_MACHINE:
        return gpu_machine(
            known_hardware(name), spec, engine=engine, tensor_parallel=tensor_parallel, kv_dtype=kv_dtype
        )
    if tensor_parallel != 1:
        raise ConfigError(f"--tensor-parallel is {tensor_parallel}; this machine is one device: leave it out")
    return this_machine(spec, engine, config or EngineConfig(kv_dtype=kv_dtype))


def _spec_from_config(path: Path) -> ModelSpec:
    if not path.is_file():
        raise ConfigError(f"no file {path}; give the path of a model's config.json")
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return spec_from_hf_config(name, read_json(path))


def _spec_from_files(files: ModelFiles) -> ModelSpec:
    if not files.is_gguf:
        return replace(_spec_from_config(files.path / "config.json"), name=files.name)
    from blendserve.models.gguf_file import GgufFile
    from blendserve.models.gguf_spec import spec_from_gguf

    return spec_from_gguf(files.name, GgufFile(files.path))

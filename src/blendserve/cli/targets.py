"""What a plan or a simulation is for: a model by its shape alone, and the hardware under it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blendserve.cli.options import positive_integer, tell
from blendserve.costs.hardware import HARDWARE_BY_NAME, known_hardware
from blendserve.costs.model_cost import ModelCost
from blendserve.costs.step_cost import SEQUENTIAL
from blendserve.costs.stored_calibration import load_calibration
from blendserve.engine.limits import MAX_KV_SHARE
from blendserve.errors import CapacityError, ConfigError
from blendserve.host import cache_dir
from blendserve.models.hub import DEFAULT_MODEL, DESCRIPTION_PATTERNS, ModelFiles, resolve
from blendserve.models.known import MODEL_BY_NAME
from blendserve.models.load import load_tokenizer
from blendserve.models.spec import ModelSpec, spec_from_hf_config
from blendserve.models.tokenizer import Tokenizer, read_json
from blendserve.simulator.simulate import EngineKind, Machine, gpu_machine

THIS_MACHINE = "this-machine"
DEFAULT_HARDWARE = "a100-80g"
HARDWARE_NAMES = (*HARDWARE_BY_NAME, THIS_MACHINE)
ENGINES: tuple[EngineKind, ...] = ("overlapped", "sequential")
_MAX_NUM_SEQS_HERE = 256
"""What `blendserve run` takes unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Target:
    """A model's shape, and its files where there are any."""

    spec: ModelSpec
    files: ModelFiles | None


def add_target(parser: argparse.ArgumentParser, default_hardware: str, default_model: str) -> None:
    """Options that say for what to plan or simulate."""
    group = parser.add_argument_group("target", "what to plan or simulate for; no weights are read")
    group.add_argument(
        "--hardware",
        choices=HARDWARE_NAMES,
        metavar="NAME",
        help=f"{', '.join(HARDWARE_BY_NAME)}, or {THIS_MACHINE} (after `blendserve calibrate`); default: "
        f"{default_hardware}",
    )
    group.add_argument(
        "--model",
        metavar="SPEC",
        help=f"{', '.join(MODEL_BY_NAME)}, a path to a config.json, or what `blendserve run --model` takes; default: "
        f"{default_model}",
    )
    group.add_argument(
        "--tensor-parallel",
        type=positive_integer,
        default=1,
        metavar="N",
        help="GPUs that hold one copy of the model (1)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="the model whose tokenizer counts the tokens of the file; default: that of --model, or where that is only "
        f"a shape, of {DEFAULT_MODEL.name}",
    )


def find_target(name: str | None) -> Target:
    """The shape of a model: of a known name, of a config.json, or of a model's files. Raises: ConfigError."""
    if name in MODEL_BY_NAME:
        return Target(MODEL_BY_NAME[name], None)
    if name is not None and name.endswith(".json"):
        return Target(_spec_from_config(Path(name).expanduser()), None)
    try:
        files = resolve(name, cache_dir(), notify=tell, hub_patterns=DESCRIPTION_PATTERNS)
    except ConfigError as error:
        if name is None or "/" in name:
            raise
        raise ConfigError(f"{error}; known shapes: {', '.join(MODEL_BY_NAME)}; or give a config.json") from None
    return Target(_spec_from_files(files), files)


def find_tokenizer(name: str | None, target: Target) -> tuple[Tokenizer, str | None]:
    """A tokenizer, and whose it is where that is not the target's own model."""
    if name is None and target.files is not None:
        return load_tokenizer(target.files), None
    files = resolve(name, cache_dir(), notify=tell, hub_patterns=DESCRIPTION_PATTERNS)
    return load_tokenizer(files), files.name


def find_machine(args: argparse.Namespace, spec: ModelSpec, engine: EngineKind = "overlapped") -> Machine:
    """One replica on the hardware that was asked for; without a word on it, this machine if it is calibrated.

    Raises: ConfigError when there is no calibration; CapacityError when the weights do not fit.
    """
    name = args.hardware or (THIS_MACHINE if is_calibrated() else DEFAULT_HARDWARE)
    if name != THIS_MACHINE:
        return gpu_machine(known_hardware(name), spec, engine=engine, tensor_parallel=args.tensor_parallel)
    if args.tensor_parallel != 1:
        raise ConfigError(f"--tensor-parallel is {args.tensor_parallel}; this machine is one device: leave it out")
    return this_machine(spec, engine)


def is_calibrated() -> bool:
    return (cache_dir() / "calibration.json").is_file()


def this_machine(spec: ModelSpec, engine: EngineKind = "overlapped") -> Machine:
    """The machine as it was measured, with the KV memory and the limit on requests that `blendserve run` would take."""
    calibration = load_calibration(cache_dir())
    model = ModelCost.from_spec(spec)
    cost = calibration.step_cost(model)
    usable = calibration.memory_bytes - model.weight_bytes
    if usable <= 0:
        raise CapacityError(
            f"{spec.name} has {model.weight_bytes / 1e9:.1f} GB of weights, this machine "
            f"{calibration.memory_bytes / 1e9:.1f} GB of memory: name a smaller model or other hardware"
        )
    return Machine(
        hardware=calibration.hardware(),
        model=model,
        tensor_parallel=1,
        cost=replace(cost, interference=SEQUENTIAL) if engine == "sequential" else cost,
        capacity_tokens=min(
            int(usable * MAX_KV_SHARE / model.kv_bytes_per_token), _MAX_NUM_SEQS_HERE * spec.max_position
        ),
        overlap=cost.interference,
        max_num_seqs=_MAX_NUM_SEQS_HERE,
    )


def name_list(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """An argument type: known names with commas between, each once."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not known; choose from {', '.join(known)}")
        return names

    return parse


def check_page_path(path: Path | None) -> None:
    """Say before the work that a page cannot be written after it. Raises: ConfigError."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        reason = "it is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise ConfigError(f"cannot write {path}: {reason}; give --html another path")


def write_page(path: Path, page: str) -> None:
    """Write an HTML page. Raises: ConfigError when the path cannot be written."""
    try:
        path.write_text(page, encoding="utf-8", errors="replace")  # names of files may be no text
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; give --html another path") from error
    tell(f"wrote {path}")


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

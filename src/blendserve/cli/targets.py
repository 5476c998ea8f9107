"""Options of `plan` and `simulate`: what for, and where pages go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from blendserve.cli.options import add_kv_dtype, positive_integer, tell
from blendserve.costs.hardware import HARDWARE_BY_NAME
from blendserve.errors import ConfigError
from blendserve.models.hub import DEFAULT_MODEL
from blendserve.models.known import MODEL_BY_NAME
from blendserve.simulator.target import HARDWARE_NAMES, THIS_MACHINE


def add_target(parser: argparse.ArgumentParser, default_hardware: str, default_model: str) -> None:
    """Options that say for what to plan or simulate."""
    group = parser.add_argument_group(
        "target", "the hardware and the model to plan or simulate for; no weights are read"
    )
    group.add_argument(
        "--hardware",
        choices=HARDWARE_NAMES,
        metavar="NAME",
        help=f"{', '.join(HARDWARE_BY_NAME)}, or {THIS_MACHINE} (once it is calibrated) (default: {default_hardware})",
    )
    group.add_argument(
        "--model",
        metavar="SPEC",
        help=f"{', '.join(MODEL_BY_NAME)}, a path to a config.json, or what `blendserve run --model` takes (default: "
        f"{default_model})",
    )
    group.add_argument(
        "--tensor-parallel",
        type=positive_integer,
        default=1,
        metavar="N",
        help="GPUs that hold one copy of the model (default: 1)",
    )
    add_kv_dtype(group)
    group.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="a model whose tokenizer counts the tokens of the file (default: that of --model, or of "
        f"{DEFAULT_MODEL.name} if --model is only a shape)",
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

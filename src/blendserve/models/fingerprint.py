"""A short name for the exact files of a model, quick enough to compute at every start."""

from __future__ import annotations

import hashlib
from pathlib import Path

from blendserve.errors import ConfigError
from blendserve.models.hub import ModelFiles, split_names

_HEAD_BYTES = 1 << 20
_NUM_SAMPLES = 256
_SAMPLE_BYTES = 1 << 12
_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja")
"""Weights in every format that an engine may read, and what says how to read them."""


def fingerprint(files: ModelFiles) -> str:
    """Hash of the size, the beginning and evenly spread samples of every file that answers depend on: 16 hex digits.

    The beginning of a file of weights names its tensors; the samples tell apart models that were trained further, also
    where first and last tensors stayed as they were. A change between two samples goes unseen. Raises: ConfigError when
    a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=8)
    if files.is_gguf:
        paths = [files.path.with_name(name) for name in split_names(files.path.name)]
    else:
        paths = sorted(path for path in files.path.iterdir() if path.suffix in _SUFFIXES)
    for path in paths:
        _add(path, digest)
    return digest.hexdigest()


def identity_of(name: str, files: ModelFiles) -> str:
    """Which model exactly: its name, what its files hold, and the commit of one from the hub. Raises: ConfigError."""
    return " ".join([name, fingerprint(files), *([f"revision {files.revision}"] if files.revision else [])])


def _add(path: Path, digest: hashlib.blake2b) -> None:
    try:
        size = path.stat().st_size
        digest.update(f"{path.suffix}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
            rest = max(0, size - _HEAD_BYTES)
            for sample in range(1, _NUM_SAMPLES + 1):
                file.seek(_HEAD_BYTES + max(0, rest * sample // _NUM_SAMPLES - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error

"""A short name for the exact files of a model, quick enough to compute at every start."""

from __future__ import annotations

import hashlib
from pathlib import Path

from blendserve.errors import ConfigError
from blendserve.models.hub import ModelFiles

_SAMPLE_BYTES = 1 << 20
_SUFFIXES = (".gguf", ".safetensors", ".json", ".jinja")


def fingerprint(files: ModelFiles) -> str:
    """Hash of the size, the beginning and the end of every file that answers depend on: 16 hex digits.

    Headers hold the name and place of every tensor, so models that differ in more than a few values in the middle of
    a file get different names. Raises: ConfigError when a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=8)
    paths = [files.path] if files.is_gguf else sorted(p for p in files.path.iterdir() if p.suffix in _SUFFIXES)
    for path in paths:
        _add(path, digest)
    return digest.hexdigest()


def _add(path: Path, digest: hashlib.blake2b) -> None:
    try:
        size = path.stat().st_size
        digest.update(f"{path.suffix}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            if size > 2 * _SAMPLE_BYTES:
                file.seek(-_SAMPLE_BYTES, 2)
            digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
